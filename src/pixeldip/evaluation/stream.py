"""One pass over a set of images: images -> features -> what the metrics need.

Batches have fixed borders. Process r of R takes batches r, r + R, r + 2R …, and their features come together in
the main process in the order of the images, which alone sums them up. So the numbers do not depend on R, and no
image is counted twice.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..processes import Processes
from .extractors import Extractor
from .image_sets import ImageSet
from .metrics import Moments, border_gradients

Feature = tuple[str, str]
"""(extractor, output), for instance ("inception", "pool")."""


@dataclass
class Measured:
    """What one pass leaves in the main process. The other processes get an empty one.

    Attributes:
        moments: mean and covariance of each feature over all images.
        kept: features of the images in `chosen`, float32 (len(chosen), D).
        chosen: indices of the images whose features are kept, increasing.
        columns, rows: mean absolute step to the next pixel by place, (W - 1,) and (H - 1,).
        digests: one per image, equal for equal pixels; None for statistics read from a file.
        low, high: smallest and largest pixel value.
        seconds: spent on images, on each extractor, on sums.
    """

    count: int
    height: int
    width: int
    moments: dict[Feature, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    kept: dict[Feature, Tensor] = field(default_factory=dict)
    chosen: np.ndarray = field(default_factory=lambda: np.arange(0))
    columns: np.ndarray | None = None
    rows: np.ndarray | None = None
    digests: list[bytes] | None = None
    low: int = 0
    high: int = 255
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def pixels_sha256(self) -> str | None:
        """The same for the same images in the same order, however they are stored."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest() if self.digests else None


@dataclass
class _Part:
    """One batch's contribution, on its way to the main process."""

    features: dict[Feature, Tensor]
    columns: Tensor
    rows: Tensor
    digests: list[bytes]
    low: int
    high: int
    images: np.ndarray | None


def measure(
    images: ImageSet,
    extractors: Sequence[Extractor],
    processes: Processes,
    batch_size: int = 64,
    chosen: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda _: None,
    save: Callable[[np.ndarray], None] | None = None,
) -> Measured:
    """Runs every image through every extractor.

    Args:
        chosen: increasing indices of the images whose features are kept; None: all.
        advance: told the number of images done, in the main process.
        save: given the images in order, in the main process.

    Raises:
        UserError: in every process, if an image cannot be read or a feature is not finite.
    """
    count = len(images)
    result = Measured(count, images.height, images.width, chosen=np.arange(count) if chosen is None else chosen)
    keep = np.zeros(count, bool)
    keep[result.chosen] = True
    moments = {(e.name, output): Moments(dim) for e in extractors for output, dim in e.outputs.items()}
    kept: dict[Feature, list[Tensor]] = {key: [] for key in moments if key[1] != "spatial"}
    digests: list[bytes] = []
    columns, rows = torch.zeros(images.width - 1), torch.zeros(images.height - 1)
    lows, highs, done = [], [], 0
    batches = -(-count // batch_size)
    for first in range(0, batches, processes.world_size):
        index = first + processes.rank
        mine, mistake = None, None
        if index < batches:
            try:
                span = index * batch_size, min((index + 1) * batch_size, count)
                mine = _part(images, *span, extractors, result.seconds, save is not None)
            except UserError as error:
                mistake = str(error)
        mistakes = [text for text in processes.everyones(mistake) if text]
        if mistakes:
            raise UserError(mistakes[0])
        for part in filter(None, processes.collected(mine)):
            began = time.perf_counter()
            size = len(part.digests)
            wanted = torch.from_numpy(keep[done : done + size])
            for key, rows_of_features in part.features.items():
                moments[key].update(rows_of_features)
                if key in kept:
                    kept[key].append(rows_of_features[wanted])
            columns, rows = columns + part.columns, rows + part.rows
            digests += part.digests
            lows.append(part.low)
            highs.append(part.high)
            done += size
            result.seconds["sums"] = result.seconds.get("sums", 0.0) + time.perf_counter() - began
            if save:
                save(part.images)
            advance(size)
    if processes.is_main:
        result.moments = {key: m.mean_and_covariance() for key, m in moments.items() if count > 1}
        result.kept = {key: torch.cat(parts) for key, parts in kept.items()}
        result.columns = columns.numpy() / (count * images.height * 3)
        result.rows = rows.numpy() / (count * images.width * 3)
        result.digests, result.low, result.high = digests, min(lows), max(highs)
    return result


def _part(
    images: ImageSet, start: int, stop: int, extractors: Sequence[Extractor], seconds: dict[str, float], save: bool
) -> _Part:
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        began = time.perf_counter()

    pixels = images.read(start, stop)
    lap("images")
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    columns, rows = border_gradients(batch)
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
    lap("pixels")
    features: dict[Feature, Tensor] = {}
    for extractor in extractors:
        for output, values in extractor(batch).items():
            bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                raise UserError(
                    f"{len(bad)} of {len(values)} images have {extractor.name} features that are not finite, "
                    f"the first is image {start + bad[0]}: are these the right weights?"
                )
            features[extractor.name, output] = values
        lap(extractor.name)
    return _Part(features, columns, rows, digests, int(pixels.min()), int(pixels.max()), pixels if save else None)
