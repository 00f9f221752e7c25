"""Undecoded images and their classes, as rows of a map-style Hugging Face dataset."""

import errno
import glob
import hashlib
import shlex
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import ArrowException, parquet

from ..errors import UserError
from ..recipe import DataSection
from ..terminal import printable
from .builders import BUILDERS, find_builder, first_line
from .transforms import BrokenImage, decode, upright_size

_SHARD_NAMES = ("tar_path", "file")
"""Local variables in which the builders of `datasets` hold the shard they are reading."""
_LARGEST_FILE = 2**30
"""Bytes of an image file; 16-bit RGBA of the most pixels Pillow decodes has fewer."""
_HASHED_AT_ONCE = 10_000


@dataclass(frozen=True)
class Source:
    """Undecoded images with class ids: row i is bytes, label (0 where there are no classes) and a name.

    After the rows come `no_files`, which are named like images and are none; reading one is an error.
    """

    rows: Any
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    """Empty for a source without classes."""
    no_files: tuple[str, ...] = ()
    """Links of a folder that lead nowhere, pipes, devices."""
    warnings: tuple[str, ...] = ()
    """Images and classes of a folder that are not used, though they may be meant to be."""

    def __len__(self) -> int:
        return len(self.rows) + len(self.no_files)

    def read(self, index: int) -> tuple[bytes, int, str]:
        """(file bytes, class id, name for messages) of a row.

        Raises:
            OSError: if the row holds no picture, or points to a file that cannot be read.
        """
        if index >= len(self.rows):
            return _file_bytes(self.no_files[index - len(self.rows)]), 0, ""
        row = self.rows[index]
        image = row[self.image_column] or {}
        name = image.get("path") or row.get("__key__") or f"row {index}"
        if image.get("bytes") is None and not image.get("path"):
            raise OSError(errno.EINVAL, "no picture in it", name)
        data = image["bytes"] if image.get("bytes") is not None else _file_bytes(image["path"])
        label = row[self.label_column] if self.label_column else 0
        if self.label_column and not self._is_class(label):
            raise OSError(errno.EINVAL, f"class {label}, where there are {len(self.class_names)}", name)
        return data, label, printable(name, one_line=True)

    def picture(self, index: int) -> tuple[Image.Image, int, str]:
        """(upright RGB picture, class id, name for messages) of a row.

        Raises:
            BrokenImage: naming the row, if it cannot be read.
        """
        try:
            data, label, name = self.read(index)
        except OSError as error:
            where = printable(error.filename or f"row {index}", one_line=True)
            raise BrokenImage(f"{where}: {error.strerror or error}") from error
        try:
            return decode(data), label, name
        except BrokenImage as error:
            raise BrokenImage(f"{name}: {error}") from error

    def size(self, index: int) -> tuple[int, int] | None:
        """(height, width) of a row's picture, from its header alone; None if it cannot be read."""
        try:
            return upright_size(self.read(index)[0])
        except OSError:
            return None

    def hashes(self) -> list[bytes]:
        """SHA-256 of each row's file bytes; b"" for those that cannot be read, which `read` reports."""

        def hash_of(index: int) -> bytes:
            try:
                return hashlib.sha256(self.read(index)[0]).digest()
            except OSError:
                return b""

        found: list[bytes] = []
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self), _HASHED_AT_ONCE):
                found += pool.map(hash_of, range(start, min(start + _HASHED_AT_ONCE, len(self))))
        return found

    def labels(self) -> np.ndarray | None:
        """The class ids of all rows, (n,), 0 for those without one; None for a source without classes."""
        if not self.label_column:
            return None
        found = [label if self._is_class(label) else 0 for label in self.rows[self.label_column]]
        return np.array([*found, *[0] * len(self.no_files)], np.int64)

    def _is_class(self, label: int | None) -> bool:
        return label is not None and 0 <= label < len(self.class_names)


def _file_bytes(name: str) -> bytes:
    """The bytes of a file that a stranger's table or folder names.

    Raises:
        OSError: unless it is a regular file, of a size that a picture can have.
    """
    path = Path(name)
    if not path.is_file():
        dangling = path.is_symlink() and not path.exists()
        raise OSError(errno.ENOENT, "a link that leads nowhere" if dangling else "not a file", name)
    if path.stat().st_size > _LARGEST_FILE:
        raise OSError(errno.EFBIG, f"more than {_LARGEST_FILE} bytes", name)
    return path.read_bytes()


def open_source(section: DataSection) -> Source:
    """Finds out what `source` is and opens it.

    Raises:
        UserError: if there is no such source, or it holds no images. The message begins with the source's name; the
            caller puts in front where that came from, a recipe or a flag.
    """
    import datasets

    if not section.source:
        raise UserError("the name of the images is empty: give a folder, a file or a hub dataset")
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # errors are raised, too
    datasets.disable_progress_bars()
    builder, arguments, pictures = find_builder(section.source, section.split)
    try:
        rows = datasets.load_dataset(builder, split=section.split, **arguments)
    except Exception as error:  # datasets raises many kinds
        raise UserError(f"{section.source}: {_why_unread(section.source, error)}") from error
    if len(rows) == 0:
        raise UserError(f"{section.source}: no images in it")
    source = _with_columns(rows, section)
    if pictures is None:
        return source
    warnings = tuple(pictures.warnings(source.rows, source.image_column, section))
    return replace(source, no_files=pictures.no_files, warnings=warnings)


def class_count(section: DataSection) -> int | None:
    """How many classes a source has; None if that cannot be known without loading it.

    The names of folders and the schema of a parquet file are enough. A folder with a metadata file is loaded.

    Raises:
        UserError: as of `open_source`.
    """
    import datasets

    if section.label_column == "none":
        return 0
    if not section.source or "://" in section.source:
        return None
    try:
        builder, arguments, pictures = find_builder(section.source, section.split)
    except UserError:
        return None
    if pictures and pictures.metadata:
        return len(open_source(section).class_names)
    if pictures and not section.label_column:
        return len(pictures.class_names)
    if builder == "parquet":
        files = next(iter(arguments["data_files"].values()))
        try:
            schema = parquet.read_schema(glob.glob(files if isinstance(files, str) else files[0])[0])
        except (OSError, ArrowException) as error:
            raise UserError(f"{section.source}: {first_line(error)}") from error
        features = datasets.Features.from_arrow_schema(schema)
        column = section.label_column or _class_column(features)
        if column is None:
            return 0
        return getattr(features.get(column), "num_classes", None)
    return None


def _with_columns(rows: Any, section: DataSection) -> Source:
    import datasets

    columns = f"its columns are {', '.join(rows.features)}"
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    files = [name for name, feature in rows.features.items() if _holds_files(feature)]
    image_column = section.image_column or next(iter(images), None)
    if image_column not in images + files:
        called = f" called {image_column}" if image_column else ""
        advice = f"; if {files[0]} holds images' files: --data.image-column {shlex.quote(files[0])}" if files else ""
        raise UserError(f"{section.source}: no column of images{called}; {columns}{advice}")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))

    label_column = section.label_column or _class_column(rows.features)
    if label_column in (None, "none"):
        return Source(rows, image_column, None, ())
    if label_column not in rows.features:
        raise UserError(f"{section.source}: label column {label_column}: no such column; {columns}")
    if not isinstance(rows.features[label_column], datasets.ClassLabel):
        try:
            rows = _with_classes(rows, label_column)
        except Exception as error:  # datasets and Arrow raise many kinds
            why = f"label column {label_column}: holds no classes ({first_line(error)})"
            raise UserError(f"{section.source}: {why}") from error
    return Source(rows, image_column, label_column, tuple(rows.features[label_column].names))


def _with_classes(rows: Any, column: str) -> Any:
    """A column of names or numbers as classes, names in alphabetical order, whole numbers in theirs, so that they are
    the ids, too; nulls and numbers below 0 are no class. Only this column is written again, not the images."""
    import datasets

    feature = rows.features[column]
    if not isinstance(feature, datasets.Value):
        raise TypeError(f"it is of type {type(feature).__name__}")
    values = rows[column][:]
    kinds = set(values) - {None}
    if "int" in feature.dtype:
        kinds = {value for value in kinds if value >= 0}
    ids = {value: k for k, value in enumerate(sorted(kinds))}
    labels = [ids.get(value, -1) for value in values]
    classes = datasets.ClassLabel(names=[str(value) for value in ids])
    return rows.remove_columns(column).add_column(column, labels, feature=classes)


def _holds_files(feature: Any) -> bool:
    """Whether a column is of bytes, or of images whose table does not say that they are."""
    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _class_column(features: Any) -> str | None:
    import datasets

    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("label", "labels", "cls", "class") if name in features]
    return next(iter(classes + usual), None)


def _why_unread(source: str, error: Exception) -> str:
    """The error of `datasets` as a message, with advice and the name of the shard that it was reading."""
    cause = error.__cause__ or error
    text = first_line(error)
    seen = (frame.f_locals.get(name) for frame, _ in traceback.walk_tb(cause.__traceback__) for name in _SHARD_NAMES)
    shard = next((name for name in seen if isinstance(name, str) and name.endswith(tuple(BUILDERS))), None)
    if "invalid literal for int()" in text:
        text += "; a .cls entry is the number of a class; write names into .txt entries: --data.label-column txt"
    elif isinstance(cause, ArrowException | ValueError) and text.startswith(("Failed to parse", "Couldn't cast")):
        text += "; all shards must have the same columns, of the same types"
    return text if shard is None or shard.endswith(source) else f"{printable(shard, one_line=True)}: {text}"
