"""Which builder of `datasets` reads a source: a folder, a file, a bundled set, an address or a hub dataset."""

import glob
import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..run_folder import may_be_hub_id
from .image_folder import OTHER_PICTURES, SPLITS, Pictures, image_folder, is_image, passed_over, walk

BUNDLED = {"emoji": {"train": "emoji-train.parquet", "test": "emoji-test.parquet"}}
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_MOST_FOLDERS = 1_000_000
"""In one source; folders that link to each other can be walked in endless ways."""


def find_builder(source: str, split: str) -> tuple[str, dict[str, Any], Pictures | None]:
    """The builder and the keyword arguments to call `datasets.load_dataset` with, and of a folder of images what it
    will find there.

    Raises:
        UserError: if there is no such source, or it holds nothing that can be read.
    """
    path = Path(os.path.expanduser(source))
    if source in BUNDLED and not path.exists():
        folder = resources.files(__package__) / "bundled"
        return "parquet", {"data_files": {split: str(folder / name) for split, name in BUNDLED[source].items()}}, None
    if path.is_file():
        if path.suffix.lower() in BUILDERS:
            return BUILDERS[path.suffix.lower()], {"data_files": {"train": glob.escape(str(path))}}, None
        raise UserError(f"{source}: a file, but neither .parquet nor .tar; give the folder that holds the images")
    if path.is_dir():
        return _in_folder(source, path, split)
    if "://" in source:
        return *_remote(source, split), None
    if may_be_hub_id(source):
        return source, {}, None
    raise UserError(f"{source}: no such folder or file, and not a hub id or one of {', '.join(BUNDLED)}")


def _in_folder(source: str, path: Path, split: str) -> tuple[str, dict[str, Any], Pictures | None]:
    """As `find_builder`, for a folder of pictures or of shards, of one kind."""
    shards: dict[str, list[str]] = {suffix: [] for suffix in BUILDERS}
    others: Counter[str] = Counter()
    has_images = False
    for count, (folder, names, _) in enumerate(walk(path)):
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
        raise UserError(f"{source}: {first_line(error)}") from error


def _remote(source: str, split: str) -> tuple[str, dict[str, Any]]:
    """Shards at an address that fsspec knows, for instance in an object store. They are copied into the local cache."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        files = [filesystem.unstrip_protocol(file) for file in sorted(filesystem.find(path))]
    except ImportError as error:  # names the package for this kind of store
        raise UserError(f"{source}: {first_line(error)}") from None
    except Exception as error:  # each store's client raises its own kinds
        raise UserError(f"{source}: cannot be reached ({first_line(error)})") from error
    base = filesystem.unstrip_protocol(path)
    for suffix, builder in BUILDERS.items():
        if shards := {file.removeprefix(base): file for file in files if file.lower().endswith(suffix)}:
            return builder, {"data_files": _by_split(shards, split)}
    raise UserError(f"{source}: no .parquet or .tar files there")


def _by_split(shards: Mapping[str, str], split: str) -> dict[str, list[str]]:
    """The shards of the split asked for; if there are none, those of every split, so that `datasets` lists the splits.

    As on the hub, a shard belongs to the split that the name of its file or folder contains, else to "train".

    Args:
        shards: the path or address to open each shard with, by its path below the source.
    """
    found: dict[str, list[str]] = {}
    for path, shard in sorted(shards.items()):
        words = reversed(re.split("[^a-z]+", path.lower()))  # a file's own before its folders'
        named = (name for word in words for name, spellings in SPLITS.items() if word in spellings)
        found.setdefault(next(named, "train"), []).append(shard)
    return {split: found[split]} if split in found else found


def first_line(error: Exception) -> str:
    """The first line of what a library reports, without the lists and traces below it."""
    cause = error.__cause__ or error  # of "an error occurred while generating the dataset"
    return (str(cause) or type(cause).__name__).splitlines()[0]
