"""Folders of images: what is found in them, and what of it is not used."""

import contextlib
import functools
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ..errors import UserError
from ..images import GRID, SETTINGS
from ..recipe import DataSection
from ..run_folder import LOG, RECIPE
from ..terminal import printable, some

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders that tell their split."""
_SPLIT_WORD = re.compile(rf"[-._ 0-9/\\]({'|'.join(itertools.chain(*SPLITS.values()))})[-._ 0-9/\\]")
OTHER_PICTURES = {
    *(".avif", ".heic", ".heif", ".jxl", ".svg", ""),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
}
"""Of files that may be pictures, and that `imagefolder` passes over."""


def walk(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str], list[str]]]:
    """A folder and those in it, links to folders included, each with the names of its files, and those of the folders
    left out.

    What `datasets` takes for hidden is left out: names with a dot before them, and folders with two underscores.
    """
    real = os.path.realpath(folder)
    if real in above:  # a link back up
        return
    inner, names, hidden = [], [], []
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if os.path.isdir(entry):
                (hidden if entry.name.startswith((".", "__")) else inner).append(entry.name)
            elif not entry.name.startswith("."):
                names.append(entry.name)
    yield str(folder), sorted(names), sorted(hidden)
    for name in sorted(inner):
        yield from walk(os.path.join(folder, name), (*above, real))


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Those that `imagefolder` goes by."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return frozenset(ImageFolder.EXTENSIONS)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _image_suffixes()


def _holds_images(folder: str) -> bool:
    with contextlib.suppress(PermissionError):
        return any(is_image(name) and not name.startswith(".") for name in os.listdir(folder))
    return False


@dataclass(frozen=True)
class Pictures:
    """What the `imagefolder` builder makes of a split of a folder, known before it is loaded.

    Attributes:
        folder: that all paths are in.
        files: the images of the split; those that a metadata file does not name will be left out.
        metadata: files that name images and tell their columns.
        others: files that may be images and are passed over, by suffix.
        hidden: folders with images that are passed over for their names.
        no_files: as of a `Source`.
        held: images of all splits.
    """

    folder: str
    files: list[str]
    metadata: list[str]
    others: Mapping[str, int]
    hidden: list[str]
    no_files: tuple[str, ...]
    held: int

    @functools.cached_property
    def _by_depth(self) -> dict[int, list[str]]:
        depths: dict[int, list[str]] = {}
        for file in self.files:
            depths.setdefault(file.count(os.sep), []).append(file)
        return depths

    @property
    def _grids(self) -> set[str]:
        """Pictures of the samples that lie beside them, which no metadata file is expected to name."""
        folders = map(os.path.dirname, self.metadata)
        return {os.path.join(f, GRID) for f in folders if os.path.isfile(os.path.join(f, SETTINGS))}

    @functools.cached_property
    def _parents(self) -> set[str]:
        names = {os.path.basename(os.path.dirname(file)) for file in self.files}
        return names if len(names) > 1 and not self.metadata else set()

    @property
    def class_names(self) -> set[str]:
        """Those of the folders that hold the images, if they are several and all lie at one depth."""
        return self._parents if len(self._by_depth) == 1 else set()

    def warnings(self, rows: Any, image_column: str, section: DataSection) -> Iterator[str]:
        """What is left out, once the rows are loaded."""
        if len(self.files) < self.held:
            yield (
                f"{len(self.files)} of its {self.held} images are used, those of split {section.split}: names of its "
                "folders or files tell splits; rename them if they are not meant to"
            )
        if self.metadata:
            named = pc.struct_field(rows.data.column(image_column), "path").to_pylist()
            if left_out := sorted(set(self.files) - set(named) - self._grids):
                names = self._short([self.metadata[0], *left_out])
                yield (
                    f"{names[0]} names {len(self.files) - len(left_out)} of {len(self.files)} images, and the others "
                    f"are left out: {some(names[1:])}; name them in it, too, or move it away"
                )
        elif self._parents and not self.class_names and section.label_column is None:
            most, *rest = sorted(self._by_depth.values(), key=len, reverse=True)
            names = self._short([most[0], *(file for files in rest for file in files)])
            yield (
                f"no classes, since not all images lie as deep as {names[0]}: {some(names[1:])}; move them for a class "
                "of each folder, unless none is wanted"
            )
        if self.others:
            yield passed_over(self.others)
        if self.hidden:
            yield (
                f"folders passed over, since their names begin with . or __ ({some(self._short(self.hidden))}); rename "
                "them if their images are meant to be used"
            )

    def _short(self, files: list[str]) -> list[str]:
        return [printable(os.path.relpath(file, self.folder), one_line=True) for file in files]


def passed_over(others: Mapping[str, int]) -> str:
    counts = ", ".join(f"{n} {suffix or 'without an extension'}" for suffix, n in sorted(others.items()))
    return f"files passed over, since they are not named as images that are read ({counts}); make them PNG or JPEG"


def image_folder(path: Path, split: str) -> tuple[dict[str, Any], Pictures]:
    """What the `imagefolder` builder is asked for, and what it finds. It follows links to files, but itself neither
    follows those to folders nor tells of those that lead nowhere.

    Raises:
        UserError: if there are no images of the split, or those of a run among them.
    """
    import datasets

    path = path.resolve()
    root = path / split if (path / split).is_dir() else path
    linked, no_files, hidden, held, told = [], [], [], 0, False
    for folder, names, left_out in walk(path):
        inside = Path(folder).is_relative_to(root)
        if inside and {RECIPE, LOG} <= set(names):
            raise UserError(
                f"{printable(folder, one_line=True)} is a run folder, whose samples are images, too; move it away, or "
                "give a folder that holds the images alone"
            )
        if inside:
            hidden += filter(_holds_images, (os.path.join(folder, name) for name in left_out))
        if os.path.islink(folder) and inside:
            linked.append(folder)
        for file in (os.path.join(folder, name) for name in names if is_image(name)):
            told |= bool(_SPLIT_WORD.search(file[len(str(path)) :]))
            if os.path.isfile(file):
                held += 1
            elif inside:
                no_files.append(file)
    arguments: dict[str, Any] = {"data_dir": glob.escape(str(path))}
    if root != path or (split == "train" and (linked or not told)):  # else `datasets` searches, for long, by names
        folders = dict.fromkeys([str(root), *linked])
        arguments = {"data_files": {split: [f"{glob.escape(folder)}/**" for folder in folders]}}
    builder = datasets.load_dataset_builder("imagefolder", **arguments)
    by_split = {str(name): files for name, files in builder.config.data_files.items()}
    if split not in by_split:
        if not told:
            raise UserError(f"no images of split {split}: no name in it tells a split, so all are of split train")
        raise UserError(
            f"no images of split {split}; names of its folders or files tell the splits "
            f"{', '.join(by_split)}; choose one of them, or rename them if they are not meant to"
        )
    images, metadata, others = [], [], Counter[str]()
    for file in by_split[split]:
        suffix = os.path.splitext(file)[1].lower()
        if suffix in _image_suffixes():
            images.append(file)
        elif os.path.basename(file) in builder.METADATA_FILENAMES:
            metadata.append(file)
        elif suffix in OTHER_PICTURES:
            others[suffix] += 1
    pictures = Pictures(str(path), images, metadata, others, hidden, tuple(no_files), held)
    return {"data_files": {split: by_split[split]}}, pictures
