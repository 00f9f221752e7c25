"""One pass over a set of images: images -> features -> what the metrics need.

Batches have fixed borders. Process r of R takes batches r, r + R, r + 2R …, and their features come together in
the main process in the order of the images, which alone sums them up. So the numbers do not depend on R, and no
image is counted twice.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..processes import Processes
from ..sampling import SampledImages
from .extractors import Extractor
from .image_sets import ImageSet
from .metrics import Moments, border_gradients

Feature = tuple[str, str]
"""(extractor, output), for instance ("inception", "pool")."""

MOMENTS_ONLY = {"spatial"}
"""Outputs of which no metric looks at single images: their rows are not kept."""


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
        advance: called with the number of images just done, in the main process.
        save: called with the images in order, in the main process; in the others it only says that they are wanted.

    Raises:
        UserError: in every process, if an image cannot be read or a feature is not finite.
    """
    count = len(images)
    sums = _Sums(images, extractors, np.arange(count) if chosen is None else chosen)
    starts = range(0, count, batch_size)
    mine = [(start, min(start + batch_size, count)) for start in starts[processes.rank :: processes.world_size]]
    batches = _read_ahead(images, mine)
    seconds = sums.result.seconds

    def next_part() -> _Part | None:
        with _lap(seconds, "images"):
            batch = next(batches, None)
        return batch and _measure_batch(*batch, extractors, seconds, keep_images=save is not None)

    def take(parts: Sequence[_Part | None]) -> None:
        for part in filter(None, parts):
            with _lap(seconds, "sums"):
                sums.add(part)
            if save:
                save(part.images)
            advance(len(part.digests))

    for _ in range(0, len(starts), processes.world_size):
        parts = processes.gather(processes.together(next_part))
        processes.together(lambda parts=parts: take(parts))
    if processes.is_main:
        sums.finish()
    return sums.result


def _read_ahead(images: ImageSet, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
    """(start, images) of each span; files are read while the batch before is being measured."""
    if isinstance(images, SampledImages):
        for start, stop in spans:
            yield start, images.read(start, stop)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for span in spans:
            upcoming = span[0], pool.submit(images.read, *span)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = upcoming
        if waiting:
            yield waiting[0], waiting[1].result()


def _measure_batch(
    start: int, pixels: np.ndarray, extractors: Sequence[Extractor], seconds: dict[str, float], keep_images: bool
) -> _Part:
    with _lap(seconds, "pixels"):
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        columns, rows = border_gradients(batch)
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
        low, high = int(pixels.min()), int(pixels.max())
    features: dict[Feature, Tensor] = {}
    for extractor in extractors:
        with _lap(seconds, extractor.name):
            found = extractor(batch)
        for output, values in found.items():
            bad = (~values.isfinite().all(1)).nonzero().flatten().tolist()
            if bad:
                raise UserError(
                    f"{len(bad)} of {len(values)} images have {extractor.name} features that are not finite, "
                    f"the first is image {start + bad[0]}: are these the right weights?"
                )
            features[extractor.name, output] = values
    return _Part(features, columns, rows, digests, low, high, pixels if keep_images else None)


class _Sums:
    """Adds up parts in the order of the images, in the main process."""

    def __init__(self, images: ImageSet, extractors: Sequence[Extractor], chosen: np.ndarray):
        self.result = Measured(len(images), images.height, images.width, chosen=chosen)
        self._chosen = np.zeros(len(images), bool)
        self._chosen[chosen] = True
        self._done = 0
        self._moments = {(e.name, output): Moments(dim) for e in extractors for output, dim in e.outputs.items()}
        self._kept: dict[Feature, list[Tensor]] = {key: [] for key in self._moments if key[1] not in MOMENTS_ONLY}
        self._columns, self._rows = torch.zeros(images.width - 1), torch.zeros(images.height - 1)
        self._digests: list[bytes] = []
        self._low, self._high = 255, 0

    def add(self, part: _Part) -> None:
        size = len(part.digests)
        wanted = torch.from_numpy(self._chosen[self._done : self._done + size])
        for key, rows in part.features.items():
            self._moments[key].update(rows)
            if key in self._kept:
                self._kept[key].append(rows[wanted])
        self._columns, self._rows = self._columns + part.columns, self._rows + part.rows
        self._digests += part.digests
        self._low, self._high = min(self._low, part.low), max(self._high, part.high)
        self._done += size

    def finish(self) -> None:
        result = self.result
        if result.count > 1:
            result.moments = {key: moments.mean_and_covariance() for key, moments in self._moments.items()}
        result.kept = {key: torch.cat(parts) for key, parts in self._kept.items()}
        result.columns = self._columns.numpy() / (result.count * result.height * 3)
        result.rows = self._rows.numpy() / (result.count * result.width * 3)
        result.digests, result.low, result.high = self._digests, self._low, self._high


@contextlib.contextmanager
def _lap(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
