"""Where sampled images go: one `.npz`, or a folder of PNG files that say how they were made."""

import contextlib
import functools
import json
import re
import reprlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from ..data import NpzWriter
from ..errors import UserError
from ..files import replacing, write_json, write_text, writing
from ..images import GRID, SETTINGS, display_scale, grid, save_png
from .sampled_images import SampledImages, weights_sha256

GRID_LIMIT = 256


class NpzImageWriter(NpzWriter):
    """Sampled images in one `.npz` with their classes; use as a context manager, add images in order."""

    def __init__(self, images: SampledImages, out: Path):
        super().__init__(out, len(images), images.height, images.width, images.made_with())
        self._labels = images.labels

    def finish(self) -> None:
        super().finish(**({} if self._labels is None else {"arr_1": self._labels}))


class ImageFolderWriter:
    """Sampled images as PNG files that say how they were made; use as a context manager, add images in order.

    The folder also gets `settings.json`, `metadata.jsonl` (file, class and seed of each image that is there, as
    Hugging Face's imagefolder reads them) and, once all are there, `grid.png` of the first images. It takes images of
    the same settings and weights only, so that these tell of all of them, whatever ended the block.

    Raises:
        UserError: if nothing can be written there, or it holds images made otherwise.
    """

    def __init__(self, images: SampledImages, out: Path):
        self.images, self.out = images, out
        self._count = 0
        self._first: list[Image.Image] = []

    @functools.cached_property
    def _made_with(self) -> dict[str, Any]:
        """As it is read again, with what tells that a model was trained further, or replaced, since."""
        weights = weights_sha256(self.images.pipeline.model)
        return json.loads(json.dumps({**self.images.made_with(), "weights_sha256": weights}))

    def __enter__(self) -> "ImageFolderWriter":
        with writing(f"out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            self._refuse_images_made_otherwise()
            write_json(self.out / SETTINGS, self._made_with)
        return self

    def add(self, images: np.ndarray) -> None:
        """The next images, uint8 (n, H, W, 3)."""
        for pixels in images:
            i = self._count
            picture = Image.fromarray(pixels)
            save_png(picture, self.out / _image_name(i), self.images.one_made_with(i))
            if i < GRID_LIMIT:
                self._first.append(picture)
            self._count += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # what went wrong first is what counts
        with writing(f"out {self.out}") if kind is None else contextlib.suppress(OSError):
            self._list_images()
            if kind is None and self._first:
                self._summarise()

    def _refuse_images_made_otherwise(self) -> None:
        if not any(re.fullmatch(r"\d{6,}\.png", path.name) for path in self.out.iterdir()):
            return
        try:
            found = json.loads((self.out / SETTINGS).read_bytes())
            differs = {name: found[name] for name in self._made_with if found[name] != self._made_with[name]}
        except (OSError, ValueError, RecursionError, LookupError, TypeError):
            why = f"and no {SETTINGS} that tells how they were made"
        else:
            differs.pop("command", None)  # batch size and device make no other images
            if not differs:
                return
            name, value = next(iter(differs.items()))
            why = f"of {name} {reprlib.repr(value)}, not {reprlib.repr(self._made_with[name])}"
        raise UserError(f"out {self.out}: holds images {why}; name another folder, or delete this one first")

    def _list_images(self) -> None:
        rows = []
        for i, seed in enumerate(self.images.seeds):
            name, label = _image_name(i), self.images.class_of(i)
            if (self.out / name).is_file():
                row = {"file_name": name, "seed": int(seed)}
                row |= {} if label is None else {"label": str(label)}
                rows.append(json.dumps(row) + "\n")
        write_text(self.out / "metadata.jsonl", "".join(rows))

    def _summarise(self) -> None:
        chosen = self.images.chosen
        in_turn = self.images.order_seed is None and 1 < len(chosen) <= 16
        across = min(len(self._first), len(chosen) if in_turn else 8)
        with replacing(self.out / GRID) as partial:
            grid(self._first, across, scale=display_scale(self.images.width)).save(partial, "PNG")


def _image_name(index: int) -> str:
    return f"{index:06d}.png"


ImageWriter = NpzImageWriter | ImageFolderWriter
"""Context managers with `add(images)`, for images uint8 (n, H, W, 3) in order."""


def image_writer(images: SampledImages, out: Path) -> ImageWriter:
    """The writer for a path: `.npz`, or a folder."""
    return (NpzImageWriter if out.suffix == ".npz" else ImageFolderWriter)(images, out)
