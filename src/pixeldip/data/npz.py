"""Batches of images in one file, as ADM's tools write and read them.

An `.npz` with `arr_0` (N, H, W, 3) uint8 and, optionally, `arr_1` (N,) class ids; a reference batch also holds
`mu, sigma, mu_s, sigma_s` (Dhariwal & Nichol 2021). They are read here, and written in `npz_writer`. Nothing unpickles,
and no array is read before its claimed size has been compared with what the file can hold.
"""

import io
import json
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LONGEST_HEADER = 10_000
_MOST_UNPACKED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
"""The most bytes that one packed byte can become, by the two ways numpy packs."""
_CHUNK = 1 << 22
# what zipfile and numpy raise for damaged files, beside each other's ValueError
_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    SyntaxError,
    OverflowError,
    RecursionError,
    RuntimeError,  # an encrypted member; NotImplementedError: an unknown compression
    LookupError,
    TypeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
)


class NpzFile:
    """The arrays of an `.npz`, their headers checked.

    Raises:
        UserError: if it is not there, or not a complete `.npz` of plain arrays.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = {
                    info.filename.removesuffix(".npy"): info
                    for info in archive.infolist()
                    if info.filename.endswith(".npy")
                }
                self.comment = archive.comment.decode("utf-8", "replace")
        except _DAMAGE as error:
            raise UserError(f"{path}: truncated, or not an npz file ({error})") from error
        size = self.path.stat().st_size
        for name, info in self._members.items():
            packed = min(info.compress_size, size)
            if info.file_size > _MOST_UNPACKED.get(info.compress_type, 0) * packed:
                raise UserError(
                    f"{path}: {name} claims {info.file_size} bytes, more than numpy packs into {packed}: damaged"
                )

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings `NpzWriter` keeps in a file; empty for files of other tools."""
        try:
            settings = json.loads(self.comment)
        except (ValueError, RecursionError):
            return {}
        return settings if isinstance(settings, dict) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def keys(self) -> list[str]:
        return list(self._members)

    def load(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A whole array, its checksum verified.

        Raises:
            UserError: if it is missing or damaged, or has another shape than the one given.
        """
        found, dtype, fortran, start = self._header(name)
        if shape is not None and found != shape:
            raise UserError(f"{self.path}: {name} has shape {found}, expected {shape}")
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._members[name]) as member:
                flat = np.frombuffer(member.read(), dtype, offset=start)
            return flat.reshape(found, order="F" if fortran else "C").copy()
        except _DAMAGE as error:
            raise UserError(f"{self.path}: {name} is damaged ({error})") from error

    def images(self, name: str = "arr_0") -> "NpzImages":
        """The images of an array (N, H, W, 3) uint8, to be read in parts.

        Raises:
            UserError: if the array is missing or damaged, or is anything else.
        """
        shape, dtype, fortran, start = self._header(name)
        if dtype != np.uint8:
            raise UserError(
                f"{self.path}: {name} holds {dtype} values, expected uint8 from 0 to 255; convert images x in "
                "[-1, 1] with ((x + 1) * 127.5 + 0.5).clip(0, 255).astype('uint8')"
            )
        if len(shape) != 4 or shape[3] != 3:
            hint = ""
            if len(shape) == 4 and shape[1] == 3:
                hint = "; this looks like (N, 3, H, W): transpose it with x.transpose(0, 2, 3, 1)"
            raise UserError(f"{self.path}: {name} has shape {shape}, expected (N, H, W, 3){hint}")
        if fortran:
            raise UserError(f"{self.path}: {name} is stored in Fortran order; save np.ascontiguousarray(x)")
        if not 0 < shape[1] * shape[2] <= Image.MAX_IMAGE_PIXELS:
            raise UserError(
                f"{self.path}: {name} holds images of {shape[1]}x{shape[2]} pixels; between 1 and "
                f"{Image.MAX_IMAGE_PIXELS} pixels can be read"
            )
        return NpzImages(self, name, shape[0], shape[1], shape[2], start)

    def verify(self) -> None:
        """Reads everything once and compares the checksums.

        Raises:
            UserError: naming the array that is damaged.
        """
        for name, info in self._members.items():
            try:
                with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                    while member.read(_CHUNK):
                        pass
            except _DAMAGE as error:
                raise UserError(f"{self.path}: {name} is damaged ({error})") from error

    def labels(self, count: int) -> np.ndarray | None:
        """`arr_1` as int64 (count,), or None if there is none.

        Raises:
            UserError: if it is anything but one integer per image.
        """
        if "arr_1" not in self:
            return None
        shape, dtype, _, _ = self._header("arr_1")
        if shape != (count,) or dtype.kind not in "iu":
            raise UserError(f"{self.path}: arr_1 is {dtype} {shape}, expected one integer class id per image ({count})")
        return self.load("arr_1").astype(np.int64)

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype, bool, int]:
        """(shape, dtype, Fortran order, bytes before the data) of an array whose size agrees with its member's."""
        if name not in self:
            raise UserError(f"{self.path}: no array {name}; it holds {', '.join(self.keys) or 'none'}")
        info = self._members[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as member:
                magic = member.read(8)
                version = np.lib.format.read_magic(io.BytesIO(magic))
                width = {(1, 0): "<H", (2, 0): "<I"}[version]
                length_bytes = member.read(struct.calcsize(width))
                (length,) = struct.unpack(width, length_bytes)
                if length > _LONGEST_HEADER:
                    raise ValueError(f"a header of {length} bytes")
                header = io.BytesIO(length_bytes + member.read(length))
            parse = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = parse(header, max_header_size=_LONGEST_HEADER)
        except _DAMAGE as error:
            raise UserError(f"{self.path}: {name} is damaged ({error})") from error
        if dtype.hasobject:
            raise UserError(f"{self.path}: {name} holds Python objects, which are never loaded; save plain arrays")
        if dtype.kind == "V":
            raise UserError(f"{self.path}: {name} holds records; save plain arrays")
        start = len(magic) + len(length_bytes) + length
        expected, found = start + math.prod(shape) * dtype.itemsize, info.file_size
        if expected != found or any(side < 0 for side in shape) or not dtype.itemsize:
            raise UserError(
                f"{self.path}: {name} claims {shape} {dtype}, {expected} bytes, but its member has {found}: damaged"
            )
        return shape, dtype, fortran, start


class NpzImages:
    """Images of an `.npz`, read in parts: in any order from a stored member, in increasing order from a packed one."""

    def __init__(self, file: NpzFile, name: str, count: int, height: int, width: int, start: int):
        self.file, self.count, self.height, self.width = file, count, height, width
        info = file._members[name]
        self.labels: np.ndarray | None = None
        self.name = str(file.path)
        self._name, self._info, self._start = name, info, start
        self._map: np.memmap | None = None
        self._stream, self._position = None, 0
        if info.compress_type == zipfile.ZIP_STORED and count and height and width:
            with file.path.open("rb") as raw:
                raw.seek(info.header_offset)
                fields = raw.read(_LOCAL_HEADER.size)
            total = file.path.stat().st_size
            if len(fields) < _LOCAL_HEADER.size:
                raise UserError(f"{file.path}: {name} is damaged (no local header)")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(fields)
            offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length + start
            shape = (count, height, width, 3)
            if offset + math.prod(shape) > total:
                raise UserError(f"{file.path}: {name} is damaged (it ends before its last image)")
            self._map = np.memmap(file.path, np.uint8, "r", offset, shape)

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start ... stop - 1 as uint8 (n, H, W, 3)."""
        stop = min(stop, self.count)
        if self._map is not None:
            return np.array(self._map[start:stop])
        each = self.height * self.width * 3
        try:
            if self._stream is None or start < self._position:
                self._stream = zipfile.ZipFile(self.file.path).open(self._info)  # noqa: SIM115  read on and on
                self._stream.read(self._start)
                self._position = 0
            while self._position < start:
                self._stream.read(each)
                self._position += 1
            data = np.frombuffer(self._stream.read((stop - start) * each), np.uint8)
            images = data.reshape(stop - start, self.height, self.width, 3).copy()
        except _DAMAGE as error:
            raise UserError(f"{self.file.path}: {self._name} is damaged ({error})") from error
        self._position = stop
        return images
