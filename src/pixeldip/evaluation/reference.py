"""What samples are compared with: statistics from a file, features of real images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..data import NpzFile, NpzImages, NpzWriter
from ..errors import UserError
from ..files import file_sha256
from ..flow import Stream
from ..processes import Processes
from ..provenance import made_by
from ..settings import EvaluationOptions
from ..terminal import Advance
from .cache import cache_entry, load_entry, save_entry
from .extractors import Extractor
from .image_sets import ImageSet, SourceImages, open_images
from .inception import POOL_DIM, SPATIAL_DIM
from .stream import Feature, Measured, measure

KEPT_IMAGES = 10_000
"""Of a larger folder or dataset, a seeded choice of this many stands for it where metrics look at single images,
as ADM's reference batches hold this many."""
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""The arrays of an ADM reference file by feature."""

Moments = tuple[np.ndarray, np.ndarray]


@dataclass
class Reference:
    """Real images, or what is known of them.

    Attributes:
        images: None if the file holds statistics alone.
        statistics: moments read from the file, which then stand for all images it was made from.
        measured: what a pass over the images has found.
        made_with: what the file says of itself, if pixeldip wrote it.
    """

    name: str
    sha256: str
    images: ImageSet | None
    statistics: dict[Feature, Moments] = field(default_factory=dict)
    measured: Measured | None = None
    from_cache: bool = False
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def moments(self, feature: Feature) -> Moments | None:
        if feature in self.statistics:
            return self.statistics[feature]
        return self.measured.moments.get(feature) if self.measured else None

    def count_behind(self, feature: Feature) -> int | None:
        """The number of images behind the moments of a feature; None if the file does not say."""
        if feature in self.statistics:
            images = self.made_with.get("images")
            return images if isinstance(images, int) else None
        return self.measured.count if self.measured else None

    def weights_behind(self) -> str | None:
        """SHA-256 of the Inception weights of the statistics, if the file says."""
        weights = self.made_with.get("inception")
        return weights.get("sha256") if isinstance(weights, dict) else None

    def kept(self, feature: Feature) -> torch.Tensor | None:
        return self.measured.kept.get(feature) if self.measured else None


def read_statistics(file: NpzFile) -> dict[Feature, Moments]:
    """The Inception statistics of an ADM reference file; empty if it has no `mu`.

    Raises:
        UserError: if there are some, but not means and covariances of these features.
    """
    found: dict[Feature, Moments] = {}
    if ("mu" in file) != ("sigma" in file):
        missing = "sigma" if "mu" in file else "mu"
        raise UserError(f"{file.path}: {missing} is missing; it holds {', '.join(file.keys)}")
    for output, (mean_key, covariance_key) in STATISTICS.items():
        if mean_key not in file or covariance_key not in file:
            continue
        dim = {"pool": POOL_DIM, "spatial": SPATIAL_DIM}[output]
        mean, covariance = file.load(mean_key, (dim,)), file.load(covariance_key, (dim, dim))
        for key, array in ((mean_key, mean), (covariance_key, covariance)):
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise UserError(f"{file.path}: {key} holds {array.dtype} values that are not all finite floats")
        mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
        if abs(covariance - covariance.T).max() > 1e-6 * abs(covariance).max():
            raise UserError(f"{file.path}: {covariance_key} is not symmetric, so not a covariance")
        found["inception", output] = mean, covariance
    return found


def chosen_images(count: int, limit: int = KEPT_IMAGES) -> np.ndarray:
    """Increasing indices of at most `limit` images, a choice that depends on the numbers alone."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng((0, Stream.REFERENCE_CHOICE)).permutation(count)[:limit])


def measure_reference(
    reference: Reference,
    extractors: Sequence[Extractor],
    processes: Processes,
    batch_size: int,
    use_cache: bool,
    keep_all: bool,
    start: Callable[[], Advance],
    console: Console,
) -> None:
    """Fills in `measured`, from the cache where the same images met the same network before.

    Args:
        keep_all: keep the features of every image, not only of a choice of `KEPT_IMAGES`.
        start: called if there are images to measure; returns a function to call with the number just done.
    """
    images = reference.images
    keep_all = keep_all or not isinstance(images, SourceImages)
    chosen = np.arange(len(images)) if keep_all else chosen_images(len(images))
    entries = {e.name: cache_entry(reference.sha256, images, e, len(chosen)) for e in extractors}
    measured = Measured(len(images), images.height, images.width, chosen=chosen)
    missing: list[Extractor] = []
    for extractor in extractors:
        found = processes.on_main(lambda e=extractor: use_cache and load_entry(entries[e.name], measured, e, console))
        if not found:
            missing.append(extractor)
    if missing or not extractors:
        fresh = measure(images, missing, processes, batch_size, chosen, start())
        if processes.is_main:
            for extractor in missing:
                if use_cache:
                    save_entry(entries[extractor.name], fresh, extractor, console)
            fresh.moments |= measured.moments
            fresh.kept |= measured.kept
            measured = fresh
    reference.measured, reference.from_cache = measured, bool(extractors) and not missing


def open_reference(
    name: str, split: str, role: str, size: tuple[int, int], options: EvaluationOptions, processes: Processes
) -> Reference:
    """An ADM reference file, or a folder or dataset, its images not read yet.

    Args:
        role: of these images, for messages.
        size: (height, width) of the samples.

    Raises:
        UserError: if it cannot be read, is damaged, or holds neither images nor statistics.
    """
    if Path(name).suffix != ".npz":
        images = open_images(name, split, size, options.allow_resolution_mismatch, "none", skip_broken=True)
        return reference_of(images, role, processes)
    file = NpzFile(name)
    if options.verify:
        processes.on_main(file.verify)
    statistics = read_statistics(file)
    images = file.images() if "arr_0" in file else None
    if images is not None and (len(images) >= 2 or not statistics):
        reference = reference_of(images, role, processes)
    elif statistics:  # of more images than the few that are in it
        reference = Reference(name, content_hash(None, name, processes), None)
    else:
        needed = "images (arr_0) or statistics (mu, sigma)"
        raise UserError(f"{role} {name}: no {needed} in it; it holds {', '.join(file.keys)}")
    reference.statistics, reference.made_with = statistics, file.made_with
    return reference


def reference_of(images: SourceImages | NpzImages, role: str, processes: Processes) -> Reference:
    """Images as a reference, not read yet."""
    if len(images) < 2:
        raise UserError(f"{role} {images.name}: {len(images)} image; a comparison needs at least two")
    return Reference(images.name, content_hash(images, images.name, processes), images)


def content_hash(images: ImageSet | None, path: str, processes: Processes) -> str:
    """SHA-256 of a file, or of the files of a folder or dataset."""
    return processes.on_main(
        lambda: images.content_hash if isinstance(images, SourceImages) else file_sha256(Path(path))
    )


def write_reference(
    images: ImageSet,
    out: Path,
    extractor: Extractor,
    processes: Processes,
    batch_size: int,
    limit: int,
    made_with: Mapping[str, object],
    advance: Advance,
) -> Measured:
    """Writes a reference batch that ADM's evaluator reads: statistics of all images, and at most `limit` of them.

    Raises:
        UserError: if there are fewer than two images, or the file cannot be written.
    """
    if len(images) < 2:
        raise UserError(f"{len(images)} image: a covariance needs at least two")
    chosen = chosen_images(len(images), limit)
    measured = measure(images, [extractor], processes, batch_size, chosen, advance)
    if processes.is_main:
        weights = {"inception": dict(extractor.weights)}
        note = {**made_by(), **made_with, **weights, "images": len(images), "pixels_sha256": measured.pixels_sha256}
        with NpzWriter(out, len(chosen), images.height, images.width, note) as writer:
            for index in chosen:
                writer.add(images.read(int(index), int(index) + 1))
            (mu, sigma), (mu_s, sigma_s) = (measured.moments["inception", o] for o in ("pool", "spatial"))
            writer.finish(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    return measured
