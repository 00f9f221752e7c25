"""Where images come from, all as map-style Hugging Face datasets."""

import errno
import glob
import hashlib
import os
import re
import shlex
import traceback
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import ArrowException, parquet

from ..errors import UserError
from ..recipe import DataSection
from ..run_folder import may_be_hub_id
from ..terminal import printable
from .image_folder import OTHER_PICTURES, SPLITS, Pictures, image_folder, is_image, passed_over, walk
from .transforms import BrokenImage, decode, upright_size

BUNDLED = {"emoji": {"train": "emoji-train.parquet", "test": "emoji-test.parquet"}}
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_SHARD_NAMES = ("tar_path", "file")
"""Of the variables in which the builders of `datasets` hold the shard they are reading."""
_LARGEST_FILE = 2**30
"""Bytes of an image file; 16-bit RGBA of the most pixels Pillow decodes has fewer."""
_MOST_FOLDERS = 1_000_000
"""Folders that link to each other can be walked in endless ways."""
_HASHED_AT_ONCE = 10_000


@dataclass(frozen=True)
class Source:
    """Undecoded images with class ids: row i is bytes, label (0 where there are no classes) and a name.

    After the rows come files of a folder that have the name of an image and are none; reading one is an error.
    """

    rows: Any
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    """Empty for a source without classes."""
    no_files: tuple[str, ...] = ()
    """Links that lead nowhere, pipes, devices."""
    warnings: tuple[str, ...] = ()
    """What of a folder is not used though it may be meant to be: images, classes."""

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
        """(height, width) of a row's picture, which is not decoded; None if it cannot be read."""
        try:
            return upright_size(self.read(index)[0])
        except OSError:
            return None

    def hashes(self) -> list[bytes]:
        """SHA-256 of each row's file bytes; empty for those that cannot be read, which is said when they are wanted."""

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
    """The bytes of a file that a stranger's table or folder names: a regular one, of a size that a picture can have.

    Raises:
        OSError: if it is anything else.
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
        UserError: if there is no such source, or it holds no images. The message begins with its name; where that
            came from, a recipe or a flag, is for the caller to put in front.
    """
    import datasets

    if not section.source:
        raise UserError("the name of the images is empty: give a folder, a file or a hub dataset")
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # errors are raised, too
    datasets.disable_progress_bars()
    builder, arguments, pictures = _builder(section.source, section.split)
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
    """How many classes a source has, as far as that shows without opening it; None: it does not.

    It shows in the folders of images, and in the schema of parquet files. Images that a metadata file names are opened.

    Raises:
        UserError: as of `open_source`.
    """
    import datasets

    if section.label_column == "none":
        return 0
    if not section.source or "://" in section.source:
        return None
    try:
        builder, arguments, pictures = _builder(section.source, section.split)
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
            raise UserError(f"{section.source}: {_first_line(error)}") from error
        features = datasets.Features.from_arrow_schema(schema)
        column = section.label_column or _class_column(features)
        if column is None:
            return 0
        return getattr(features.get(column), "num_classes", None)
    return None


def _builder(source: str, split: str) -> tuple[str, dict[str, Any], Pictures | None]:
    """What `load_dataset` is asked for, and of a folder of images what it will find there."""
    path = Path(os.path.expanduser(source))
    if source in BUNDLED and not path.exists():
        folder = resources.files(__package__) / "bundled"
        return "parquet", {"data_files": {split: str(folder / name) for split, name in BUNDLED[source].items()}}, None
    if path.is_file():
        if path.suffix in BUILDERS:
            return BUILDERS[path.suffix], {"data_files": {"train": glob.escape(str(path))}}, None
        raise UserError(f"{source}: a file, but neither .parquet nor .tar; give the folder that holds the images")
    if path.is_dir():
        shards: dict[str, list[str]] = {suffix: [] for suffix in BUILDERS}
        others: Counter[str] = Counter()
        has_images = False
        for count, (folder, names) in enumerate(walk(path)):
            if count == _MOST_FOLDERS:
                raise UserError(f"{source}: more than {_MOST_FOLDERS} folders, those behind links included")
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                has_images |= is_image(name)
                if suffix in OTHER_PICTURES:
                    others[suffix] += 1
                if suffix in shards:
                    shards[suffix].append(os.path.join(folder, name))
        kinds = [suffix for suffix in BUILDERS if shards[suffix]] + ["pictures"] * has_images
        if not kinds:
            why = f"; {passed_over(others)}" if others else ""
            raise UserError(f"{source}: no image, .parquet or .tar files in this folder{why}")
        if len(kinds) > 1:
            raise UserError(f"{source}: holds {' and '.join(kinds)}; give a folder that holds one kind")
        (kind,) = kinds
        if kind in BUILDERS:
            by_split = _by_split({os.path.relpath(shard, path): glob.escape(shard) for shard in shards[kind]}, split)
            return BUILDERS[kind], {"data_files": by_split}, None
        try:
            return "imagefolder", *image_folder(path, split)
        except Exception as error:  # datasets raises many kinds
            raise UserError(f"{source}: {_first_line(error)}") from error
    if "://" in source:
        return *_remote(source, split), None
    if may_be_hub_id(source):
        return source, {}, None
    raise UserError(f"{source}: no such folder or file, and not a hub id or one of {', '.join(BUNDLED)}")


def _remote(source: str, split: str) -> tuple[str, dict[str, Any]]:
    """Shards at an address that fsspec knows, for instance in an object store. They are copied into the local cache."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        files = [filesystem.unstrip_protocol(file) for file in sorted(filesystem.find(path))]
    except ImportError as error:  # names the package for this kind of store
        raise UserError(f"{source}: {_first_line(error)}") from None
    except Exception as error:  # each store's client raises its own kinds
        raise UserError(f"{source}: cannot be reached ({_first_line(error)})") from error
    base = filesystem.unstrip_protocol(path)
    for suffix, builder in BUILDERS.items():
        if shards := {file.removeprefix(base): file for file in files if file.lower().endswith(suffix)}:
            return builder, {"data_files": _by_split(shards, split)}
    raise UserError(f"{source}: no .parquet or .tar files there")


def _by_split(shards: Mapping[str, str], split: str) -> dict[str, list[str]]:
    """The shards of the split asked for; those of each, for `datasets` to say what there is, if it is none of them.

    As on the hub, the name of a file or of its folder tells the split. A shard whose names tell none is of "train".

    Args:
        shards: what each is opened by, by its path below the source.
    """
    found: dict[str, list[str]] = {}
    for path, shard in sorted(shards.items()):
        words = reversed(re.split("[^a-z]+", path.lower()))  # a file's own before its folders'
        named = (name for word in words for name, spellings in SPLITS.items() if word in spellings)
        found.setdefault(next(named, "train"), []).append(shard)
    return {split: found[split]} if split in found else found


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
            rows = rows.class_encode_column(label_column)
        except Exception as error:  # datasets and Arrow raise many kinds
            why = f"label column {label_column}: holds no classes ({_first_line(error)})"
            raise UserError(f"{section.source}: {why}") from error
    return Source(rows, image_column, label_column, tuple(rows.features[label_column].names))


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
    """What `datasets` says of a source, the shard that it was reading, which its message leaves out, and advice."""
    cause = error.__cause__ or error
    text = _first_line(error)
    seen = (frame.f_locals.get(name) for frame, _ in traceback.walk_tb(cause.__traceback__) for name in _SHARD_NAMES)
    shard = next((name for name in seen if isinstance(name, str) and name.endswith(tuple(BUILDERS))), None)
    if "invalid literal for int()" in text:
        text += "; a .cls entry is the number of a class; write names into .txt entries: --data.label-column txt"
    elif isinstance(cause, ArrowException | ValueError) and text.startswith(("Failed to parse", "Couldn't cast")):
        text += "; all shards must have the same columns, of the same types"
    return text if shard is None or shard.endswith(source) else f"{printable(shard, one_line=True)}: {text}"


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error  # of "an error occurred while generating the dataset"
    return (str(cause) or type(cause).__name__).splitlines()[0]
