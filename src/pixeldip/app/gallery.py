"""The pictures a page has made: PNG files in one folder, each of which says how it was made."""

import itertools
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import check_writable
from ..images import save_png
from ..sampling import SampledImages

SHOWN = 60


class Gallery:
    """A folder of pictures, made again if it is deleted.

    Raises:
        UserError: if it cannot be written, also from `add`.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._check()

    def add(self, images: SampledImages, pixels: np.ndarray) -> None:
        """Keeps sampled images, uint8 (n, H, W, 3)."""
        self._check()
        now = time.time_ns() // 1_000_000
        stamp = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now // 1000))}-{now % 1000:03d}"
        for i in reversed(range(len(images))):  # the first image becomes the newest file, and the first one shown
            file = self.folder / f"{stamp}-{len(images) - 1 - i:03d}.png"
            save_png(Image.fromarray(pixels[i]), file, images.one_made_with(i))

    def newest(self) -> tuple[list[Path], int]:
        """The pictures to show, the newest first, and how many there are about: all that are named like pictures."""
        here = self.folder.resolve()  # what a link leads to elsewhere is not served
        named = sorted(self.folder.glob("[!.]*.png"), reverse=True)
        pictures = (path for path in named if path.is_file() and here in path.resolve().parents)
        return list(itertools.islice(pictures, SHOWN)), len(named)

    def _check(self) -> None:
        check_writable(self.folder / "picture.png")
