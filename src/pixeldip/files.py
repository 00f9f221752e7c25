"""Files that are complete or not there."""

import contextlib
import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """In here what keeps a file or folder from being written is a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written at the end of long work, and tries it out.

    Raises:
        UserError: if no file can be written there.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has that name")
        probe = path.with_name(f".{path.name}.probe")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def check_folder(folder: Path | str) -> None:
    """Raises UserError if the folder to save to is a file, where diffusers would log an error and save nothing."""
    if Path(folder).is_file():
        raise UserError(f"{folder}: a file; name a folder to save to")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write, which replaces `path` in one step at the end of the block: whoever reads
    `path`, even after the process was killed, finds the old file or the new one. An error leaves only the old one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a file as `replacing` does.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n")
