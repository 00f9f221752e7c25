"""Writes batches of images as one file, as ADM's tools read them; see `npz`."""

import contextlib
import json
import zipfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from ..files import check_writable, writing

_LONGEST_COMMENT = 65_535


class NpzWriter:
    """Writes an `.npz` of images batch by batch. Use as a context manager.

    The file appears under its name at the end of the block; after an error nothing is left of it.

    Args:
        count, height, width: of the images that will be added.
        made_with: settings to keep in the file (its zip comment), where numpy and ADM's tools do not look.

    Raises:
        UserError: if it cannot be written.
    """

    def __init__(self, path: Path | str, count: int, height: int, width: int, made_with: dict[str, Any] | None = None):
        self.path = Path(path)
        self.shape = (count, height, width, 3)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._comment = _comment(made_with or {})
        self._written = 0
        self._archive: zipfile.ZipFile | None = None
        self._images: IO[bytes] | None = None

    def __enter__(self) -> "NpzWriter":
        check_writable(self.path)
        with writing(self.path), contextlib.ExitStack() as unless_ready:
            unless_ready.callback(self._let_go)
            self._archive = zipfile.ZipFile(self._partial, "w", zipfile.ZIP_STORED)
            self._archive.comment = self._comment
            self._images = self._archive.open("arr_0.npy", "w", force_zip64=True)
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(self._images, header)
            unless_ready.pop_all()
        return self

    def add(self, images: np.ndarray) -> None:
        """The next images, uint8 (n, H, W, 3)."""
        if images.dtype != np.uint8 or images.shape[1:] != self.shape[1:]:
            raise ValueError(f"images {images.dtype} {images.shape}, expected uint8 (n, {self.shape[1:]})")
        with writing(self.path):
            self._images.write(np.ascontiguousarray(images).data)
        self._written += len(images)

    def finish(self, **arrays: np.ndarray) -> None:
        """Ends the images and writes further arrays; at most once, after the last `add`."""
        if self._written != self.shape[0]:
            raise ValueError(f"{self._written} images were added, expected {self.shape[0]}")
        with writing(self.path):
            self._images.close()
            for name, array in arrays.items():
                with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                if not self._images.closed:
                    self.finish()
                with writing(self.path):
                    self._archive.close()
                    self._partial.replace(self.path)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Closes what is open, which after an error Python would try later, and say so; leaves nothing unfinished."""
        for part in (self._images, self._archive):
            with contextlib.suppress(OSError):
                if part is not None:
                    part.close()
        self._partial.unlink(missing_ok=True)


def _comment(made_with: dict[str, Any]) -> bytes:
    """As JSON; if it does not fit, without what is longest, which `too_long` names."""
    kept, too_long = dict(made_with), []
    while len(comment := json.dumps(kept | ({"too_long": too_long} if too_long else {})).encode()) > _LONGEST_COMMENT:
        too_long.append(max(kept, key=lambda name: len(json.dumps(kept[name]))))
        del kept[too_long[-1]]
    return comment
