"""Sets of images to measure: read in parts, by index, in an order that is always the same."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..data import BrokenImage, NpzFile, Source, centre_crop, open_source
from ..errors import UserError
from ..processes import Processes
from ..recipe import DataSection
from ..settings import EvaluationOptions


class ImageSet(Protocol):
    """What can be measured: `len`, a size in pixels, class ids (n,) or None, and images by index."""

    name: str
    height: int
    width: int
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start ... stop - 1, uint8 (n, H, W, 3)."""
        ...


class ArrayImages:
    """Images in memory, uint8 (N, H, W, 3)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, name: str = "images"):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
        self.images, self.labels, self.name = images, labels, name
        self.height, self.width = images.shape[1:3]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.images[start:stop]


class SourceImages:
    """Images of a folder, parquet file or hub dataset.

    Args:
        size: (height, width) to crop and scale every picture to, as in training; None: they must all have one size.
        allow_enlarging: accept pictures smaller than `size`.
        skip_broken: a picture that cannot be read gives its place, and its entry in `labels`, to the next one, as in
            training; known once it was read, and then in `broken`.

    Attributes:
        broken: why pictures that gave their places could not be read, by their index; of those this process has met.

    Raises:
        UserError: here if the first picture cannot be read; from `read` naming the picture that cannot be
            read or has another size.
    """

    def __init__(
        self,
        source: Source,
        name: str,
        size: tuple[int, int] | None = None,
        allow_enlarging: bool = False,
        skip_broken: bool = False,
    ):
        self.source, self.name, self.crops = source, name, size is not None
        self.allow_enlarging, self.skip_broken = allow_enlarging, skip_broken
        self.labels = source.labels()
        self.broken: dict[int, str] = {}
        self.height, self.width = size or self._picture(0).shape[:2]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self._picture, range(start, min(stop, len(self))))))

    def _picture(self, index: int) -> np.ndarray:
        for attempt in range(len(self) if self.skip_broken else 1):
            try:
                picture, label, name = self.source.picture((index + attempt) % len(self))
                if attempt and self.labels is not None:
                    self.labels[index] = label
                break
            except BrokenImage as error:
                why = self.broken[(index + attempt) % len(self)] = str(error)
        else:
            raise UserError(f"{self.name}: {why}")
        if self.crops:
            if not self.allow_enlarging and (picture.height < self.height or picture.width < self.width):
                raise UserError(
                    f"{self.name}: {name} is {picture.height}x{picture.width}, smaller than the "
                    f"{self.height}x{self.width} asked for; ask for less, or add --allow-resolution-mismatch"
                )
            return centre_crop(picture, self.height, self.width)
        pixels = np.asarray(picture)
        if index and pixels.shape[:2] != (self.height, self.width):
            raise UserError(
                f"{self.name}: {name} is {picture.height}x{picture.width}, the first image "
                f"{self.height}x{self.width}: samples must all have one size"
            )
        return pixels

    @property
    def warnings(self) -> list[str]:
        """What the source tells, by the name of the set."""
        return [f"{self.name}: {text}" for text in self.source.warnings]

    def unreadable(self, processes: Processes) -> list[str]:
        """A warning, if a picture that any process has met could not be read; all of them take part."""
        broken = {index: why for found in processes.all_gather(self.broken) for index, why in found.items()}
        if not broken:
            return []
        some = "; ".join(why for _, why in sorted(broken.items())[:3]) + ("; …" if len(broken) > 3 else "")
        count = f"{len(broken)} of {len(self)} images"
        return [f"{self.name}: {count} cannot be read, and the next ones are counted twice in their places: {some}"]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the files' bytes, one after the other, read once."""
        return hashlib.sha256(b"".join(self.source.hashes())).hexdigest()


def read_rows(images: ImageSet, rows: Iterable[int]) -> np.ndarray:
    """Images of rows that need not be neighbours, uint8 (n, H, W, 3)."""
    return np.concatenate([images.read(row, row + 1) for row in rows])


def open_images(
    name: str,
    split: str = "train",
    size: tuple[int, int] | None = None,
    allow_enlarging: bool = False,
    label_column: str | None = None,
    skip_broken: bool = False,
) -> SourceImages:
    """A folder, a parquet or webdataset file, a hub dataset or a bundled set by name.

    Raises:
        UserError: if there is no such source, or it holds no images.
    """
    source = open_source(DataSection(source=name, split=split, label_column=label_column))
    return SourceImages(source, name, size, allow_enlarging, skip_broken)


def open_samples(name: str, options: EvaluationOptions, processes: Processes) -> tuple[ImageSet, list[str]]:
    """The images of a folder or `.npz`, and what of them is not used: files, labels."""
    if Path(name).suffix != ".npz":
        images = open_images(name)
        return images, images.warnings
    file = NpzFile(name)
    images, told = file.images(), []
    if options.verify:
        processes.on_main(file.verify)
    try:
        images.labels = file.labels(len(images))
    except UserError as error:
        told.append(f"labels left out: {error}")
    return images, told
