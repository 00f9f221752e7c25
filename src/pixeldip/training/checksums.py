"""SHA-256 of every file of a checkpoint, so that damage is found before anything is computed from it."""

import json
from pathlib import Path

from ..files import file_sha256, write_json
from ..run_folder import CHECKSUMS


def write_checksums(folder: Path) -> None:
    """Lists every file of a folder in `checksums.json`, which is to be the last one written into it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    write_json(folder / CHECKSUMS, sums)


def damage(folder: Path) -> str | None:
    """The first thing wrong with a checkpoint's files, or None if each is what was written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if file_sha256(folder / name) != expected:
                return f"{name} differs from its checksum"
    except (ValueError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    except OSError as error:
        path = Path(error.filename or folder)
        return f"{path.relative_to(folder).as_posix()}: {error.strerror or error}"
    return None
