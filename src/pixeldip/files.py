"""Files that are complete or not there."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from .errors import UserError


def check_writable(path: Path) -> None:
    """Makes the folder of a file that is to be written at the end of long work, and tries it out.

    Raises:
        UserError: if no file can be written there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder has that name")
        probe = path.with_name(f".{path.name}.probe")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Writes or replaces a file in one step: who reads it, or is killed here, finds the old one or the new one.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(values, indent=2) + "\n")
