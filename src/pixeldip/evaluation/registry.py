"""Metrics by name: one row each says what it needs and how it is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..flow import Stream
from ..settings import EvaluationOptions
from .extractors import Extractor
from .metrics import (
    boundary_ratio,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)
from .reference import Reference, chosen_images
from .stream import Feature, Measured

FULL_SIZE = 50_000
"""Samples behind the FID of papers."""
NEIGHBOURS = 3
FLOOR_SPLITS = 3


@dataclass
class MetricInputs:
    """All a metric can look at."""

    samples: Measured
    reference: Reference | None
    training: Reference | None
    extractors: dict[str, Extractor]
    options: EvaluationOptions
    patch_size: int
    device: torch.device

    def pairs(self, feature: Feature) -> tuple[Tensor, Tensor]:
        """Features of single samples and single references, on the device."""
        kept = self.samples.kept[feature], self.reference.kept(feature)
        return kept[0].to(self.device), kept[1].to(self.device)

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return precision_recall(*self.pairs(("inception", "pool")), NEIGHBOURS, self.options.pr_distance)

    @cached_property
    def nearest(self) -> dict[str, float | str]:
        """Distances to the nearest training image, of samples and of real images that are not in the training set.

        Where there are none, training images stand in, each compared with the others.
        """
        feature = "efficientnet", "pool"
        train = self.training.kept(feature).to(self.device)
        seen = set(self.training.measured.digests)
        references = self.reference.measured
        unseen = [i for i, image in enumerate(references.chosen) if references.digests[image] not in seen]
        if len(unseen) >= max(2, len(references.chosen) // 2):
            real, _ = nearest_neighbours(references.kept[feature][unseen].to(self.device), train)
            meaning = "reference images"
        else:
            own = torch.from_numpy(chosen_images(len(train)))
            real, _ = nearest_neighbours(train[own.to(self.device)], train, own)
            meaning = "training images, each against the others"
        samples, _ = nearest_neighbours(self.samples.kept[feature].to(self.device), train)
        copies = (samples < real.quantile(0.01)) | (samples == 0)
        return {
            "nearest": samples.median().item(),
            "real": real.median().item(),
            "closer_than_99_percent_of_real": copies.double().mean().item(),
            "real_is": meaning,
        }


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Args:
        label: for people; {n} is the number of samples, FD a Fréchet and KD a kernel distance.
        extractor: whose features it needs, if any.
        compute: the value.
        better: "higher", "lower", or what it should be near to.
        moments: the feature whose moments are compared.
        kept: the feature whose single rows are looked at.
        pairwise: a distance of two sets of rows; the floor is this distance between disjoint real images.
        real: what real images score, where it is no such distance; None where that is not known.
        scale: of the number in the terminal's table.
        of_training: whether it looks at the training images, which must be named then.
    """

    label: str
    extractor: str | None
    compute: Callable[[MetricInputs], float]
    better: str
    moments: Feature | None = None
    kept: Feature | None = None
    pairwise: Callable[[Tensor, Tensor], float] | None = None
    real: Callable[[MetricInputs], float | None] | None = None
    scale: float = 1.0
    of_training: bool = False

    @property
    def of_pixels(self) -> bool:
        """Whether it looks at pixels alone, of the reference too if there is one."""
        return self.extractor is None

    @property
    def compares(self) -> bool:
        """Whether it means nothing without a reference."""
        return self.moments is not None or self.kept is not None


def _frechet(label: str, extractor: str, output: str, floor: bool) -> Metric:
    feature = extractor, output

    def compute(m: MetricInputs) -> float:
        return frechet_distance(*m.samples.moments[feature], *m.reference.moments(feature))

    return Metric(label, extractor, compute, "lower", moments=feature, pairwise=_frechet_of_rows if floor else None)


def _kernel(label: str, extractor: str) -> Metric:
    feature = extractor, "pool"

    def compute(m: MetricInputs) -> float:
        return kernel_distance(*m.pairs(feature))

    return Metric(f"{label} ×1000", extractor, compute, "lower", kept=feature, pairwise=kernel_distance, scale=1000)


def _frechet_of_rows(a: Tensor, b: Tensor) -> float:
    def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        rows = x.cpu().double().numpy()
        return rows.mean(0), np.cov(rows, rowvar=False)

    return frechet_distance(*moments(a), *moments(b))


_POOL = ("inception", "pool")

METRICS: dict[str, Metric] = {
    "fid": _frechet("FID-{n}", "inception", "pool", floor=False),
    "sfid": _frechet("sFID-{n}", "inception", "spatial", floor=False),
    "is": Metric(
        "Inception Score",
        "inception",
        lambda m: inception_score(_in_order(m), m.extractors["inception"].classifier.to(m.device), m.options.is_split),
        "higher",
    ),
    "precision": Metric("Precision", "inception", lambda m: m.precision_recall[0], "higher", kept=_POOL),
    "recall": Metric("Recall", "inception", lambda m: m.precision_recall[1], "higher", kept=_POOL),
    "kid": _kernel("KID", "inception"),
    "fd_dinov2": _frechet("DINOv2 FD", "dinov2", "pool", floor=True),
    "kid_dinov2": _kernel("DINOv2 KD", "dinov2"),
    "kid_efficientnet": _kernel("EfficientNet KD", "efficientnet"),
    "fd_mid_efficientnet": _frechet("EfficientNet FD, middle", "efficientnet", "mid", floor=True),
    "fd_pool_efficientnet": _frechet("EfficientNet FD, pool", "efficientnet", "pool", floor=True),
    "boundary": Metric(
        "Patch boundary ratio",
        None,
        lambda m: _boundary(m, m.samples),
        "as real",
        real=lambda m: _boundary(m, m.reference and m.reference.measured),
    ),
    "nearest": Metric(
        "Nearest training image",
        "efficientnet",
        lambda m: m.nearest["nearest"],
        "as real",
        kept=("efficientnet", "pool"),
        real=lambda m: m.nearest["real"],
        of_training=True,
    ),
}
DEFAULT = ("fid", "sfid", "is", "precision", "recall")


def _boundary(m: MetricInputs, images: Measured | None) -> float | None:
    return boundary_ratio(images.columns, images.rows, m.patch_size) if images else None


def _in_order(m: MetricInputs) -> Tensor:
    pool = m.samples.kept[_POOL]
    if m.options.is_order == "shuffled":
        pool = pool[torch.from_numpy(np.random.default_rng((0, Stream.CLASS_ORDER)).permutation(len(pool)))]
    return pool.to(m.device)


def floor(name: str, m: MetricInputs) -> dict[str, float] | None:
    """What real images score; None where that is not known.

    For distances between sets, the reference is split at random into `size` images, as many as there are samples
    but at most half, and the others. "real" is the distance of the two parts, and "samples" that of as many
    samples and the others: these two compare, because a Fréchet distance also depends on the sizes of the
    sets. Means and standard deviations over seeded splits.
    """
    metric = METRICS[name]
    if metric.real:
        value = metric.real(m)
        return None if value is None else {"real": value}
    feature = metric.kept or metric.moments
    rows = m.reference.kept(feature) if m.reference and metric.pairwise else None
    if rows is None or len(rows) < 4:
        return None
    ours = m.samples.kept[feature]
    size = min(len(rows) // 2, len(ours))
    real, samples = [], []
    for split in range(FLOOR_SPLITS):
        random = np.random.default_rng((split, Stream.FLOOR))
        order, pick = (torch.from_numpy(random.permutation(n)) for n in (len(rows), len(ours)))
        others = rows[order[size:]].to(m.device)
        real.append(metric.pairwise(rows[order[:size]].to(m.device), others))
        samples.append(metric.pairwise(ours[pick[:size]].to(m.device), others))
    return {
        "size": size,
        "real": float(np.mean(real)),
        "real_deviation": float(np.std(real, ddof=1)),
        "samples": float(np.mean(samples)),
        "samples_deviation": float(np.std(samples, ddof=1)),
    }


def label(name: str, count: int) -> str:
    """A metric's name for people; FID of anything but `FULL_SIZE` samples carries their number."""
    text = METRICS[name].label
    return text.replace("-{n}", "" if count == FULL_SIZE else f"-{count}")
