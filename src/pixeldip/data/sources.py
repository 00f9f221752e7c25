"""Where images come from, all as map-style Hugging Face datasets."""

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..recipe import DataSection
from .transforms import BrokenImage, decode

BUNDLED = {"emoji": {"train": "emoji-train.parquet", "test": "emoji-test.parquet"}}
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Source:
    """Undecoded images with class ids: row i is bytes, label (0 where there are no classes) and a name."""

    rows: Any
    image_column: str
    label_column: str | None
    class_names: tuple[str, ...]
    """Empty for a source without classes."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[bytes, int, str]:
        """(file bytes, class id, name for messages) of a row.

        Raises:
            OSError: if the row points to a file that cannot be opened.
        """
        row = self.rows[index]
        image = row[self.image_column] or {}
        name = image.get("path") or row.get("__key__") or f"row {index}"
        data = image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
        return data, (int(row[self.label_column]) if self.label_column else 0), name

    def picture(self, index: int) -> tuple[Image.Image, int, str]:
        """(upright RGB picture, class id, name for messages) of a row.

        Raises:
            BrokenImage: naming the row, if it cannot be read.
        """
        try:
            data, label, name = self.read(index)
        except OSError as error:
            raise BrokenImage(f"row {index}: {error.strerror or error}") from error
        try:
            return decode(data), label, name
        except BrokenImage as error:
            raise BrokenImage(f"{name}: {error}") from error

    def labels(self) -> np.ndarray | None:
        """The class ids of all rows, (n,); None for a source without classes."""
        return np.array(self.rows[self.label_column], np.int64) if self.label_column else None


def open_source(section: DataSection) -> Source:
    """Finds out what `source` is and opens it.

    Raises:
        UserError: if there is no such source, or it holds no images.
    """
    import datasets

    if not section.source:
        raise UserError("data.source is missing: give an image folder, for instance --data.source my-photos/")
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    builder, arguments = _builder(section.source)
    try:
        rows = datasets.load_dataset(builder, split=section.split, **arguments)
    except Exception as error:  # datasets raises many kinds; its message says which file or split
        raise UserError(f"data.source {section.source}: {_first_line(error)}") from error
    if len(rows) == 0:
        raise UserError(f"data.source {section.source}: no images in it")
    return _with_columns(rows, section)


def class_count(section: DataSection) -> int | None:
    """How many classes a source has, as far as that shows without opening it; None: it does not.

    It shows in the folders of images, and in the schema of parquet files.
    """
    import datasets
    from pyarrow import parquet

    if section.label_column == "none":
        return 0
    if not section.source:
        return None
    try:
        builder, arguments = _builder(section.source)
    except UserError:
        return None
    if builder == "imagefolder" and not section.label_column:
        walk = os.walk(arguments["data_dir"])
        names = {Path(folder).name for folder, _, files in walk if any(_is_image(name) for name in files)}
        return len(names) if len(names) > 1 else 0
    if builder == "parquet":
        files = arguments["data_files"][section.split if section.source in BUNDLED else "train"]
        schema = parquet.read_schema(files if isinstance(files, str) else files[0])
        features = datasets.Features.from_arrow_schema(schema)
        column = section.label_column or _class_column(features)
        if column is None:
            return 0
        return getattr(features.get(column), "num_classes", None)
    return None


def _builder(source: str) -> tuple[str, dict[str, Any]]:
    path = Path(source).expanduser()
    if source in BUNDLED and not path.exists():
        folder = resources.files(__package__) / "bundled"
        return "parquet", {"data_files": {split: str(folder / name) for split, name in BUNDLED[source].items()}}
    if path.is_file():
        if path.suffix in BUILDERS:
            return BUILDERS[path.suffix], {"data_files": {"train": str(path)}}
        raise UserError(
            f"data.source {source}: a file, but neither .parquet nor .tar; give the folder that holds the images"
        )
    if path.is_dir():
        shards: dict[str, list[str]] = {suffix: [] for suffix in BUILDERS}
        has_images = False
        for folder, _, names in os.walk(path):
            for name in names:
                suffix = os.path.splitext(name)[1].lower()
                has_images |= _is_image(name)
                if suffix in shards:
                    shards[suffix].append(os.path.join(folder, name))
        for suffix, builder in BUILDERS.items():
            if shards[suffix]:
                return builder, {"data_files": {"train": sorted(shards[suffix])}}
        if not has_images:
            raise UserError(f"data.source {source}: no image, .parquet or .tar files in this folder")
        return "imagefolder", {"data_dir": str(path)}
    if source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith("/"):
        return source, {}
    raise UserError(f"data.source {source}: no such folder or file, and not a hub id or one of {', '.join(BUNDLED)}")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def _with_columns(rows: Any, section: DataSection) -> Source:
    import datasets

    columns = f"its columns are {', '.join(rows.features)}"
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image_column = section.image_column or next(iter(images), None)
    if image_column not in images:
        called = f" called {image_column}" if image_column else ""
        raise UserError(f"data.source {section.source}: no column of images{called}; {columns}")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))

    label_column = section.label_column or _class_column(rows.features)
    if label_column in (None, "none"):
        return Source(rows, image_column, None, ())
    if label_column not in rows.features:
        raise UserError(f"data.label_column {label_column}: no such column; {columns}")
    if not isinstance(rows.features[label_column], datasets.ClassLabel):
        rows = rows.class_encode_column(label_column)
    return Source(rows, image_column, label_column, tuple(rows.features[label_column].names))


def _class_column(features: Any) -> str | None:
    import datasets

    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("label", "labels", "cls", "class") if name in features]
    return next(iter(classes + usual), None)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
