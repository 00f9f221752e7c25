"""Features of reference images, kept for the next time: found again by content, weights and version."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..data import NpzFile
from ..errors import UserError
from ..terminal import warn
from .extractors import Extractor
from .image_sets import ImageSet
from .stream import Measured

FORMAT = 2
"""Raised when the same files would give another entry."""


def cache_entry(sha256: str, images: ImageSet, extractor: Extractor, kept: int) -> Path:
    """The file for these images (their hash, size, what is accepted, how many are kept singly) and this network."""
    key = {
        "format": FORMAT,
        "images": sha256,
        "size": [images.height, images.width],
        "kept": kept,
        # a set that is read strictly must not be found where pictures it would refuse were passed over
        "accepts": [getattr(images, name, False) for name in ("allow_enlarging", "skip_broken")],
        "extractor": [extractor.name, extractor.version, extractor.weights["sha256"]],
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / f"{extractor.name}-{digest[:32]}.npz"


def cache_folder() -> Path:
    """Where features of reference images are kept: $PIXELDIP_CACHE, or pixeldip/references in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PIXELDIP_CACHE") or Path(base) / "pixeldip" / "references").expanduser()


def save_entry(path: Path, measured: Measured, extractor: Extractor, console: Console) -> None:
    """Writes what a pass has found; that it cannot be written is said, and no error."""
    arrays: dict[str, np.ndarray] = {
        "columns": measured.columns,
        "rows": measured.rows,
        "digests": np.frombuffer(b"".join(measured.digests), np.uint8),
        "range": np.array([measured.low, measured.high]),
    }
    for output in extractor.outputs:
        feature = extractor.name, output
        if feature in measured.moments:
            arrays[f"{output}.mean"], arrays[f"{output}.covariance"] = measured.moments[feature]
        if feature in measured.kept:
            arrays[f"{output}.kept"] = measured.kept[feature].numpy()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        warn(console, f"reference features not cached in {path.parent}: {error.strerror}")


def load_entry(path: Path, measured: Measured, extractor: Extractor, console: Console) -> bool:
    """Fills in what an earlier pass has found; False if there is no such entry, or it is damaged."""
    if not path.is_file():
        return False
    try:
        file = NpzFile(path)
        arrays = {name: file.load(name) for name in {"digests", "columns", "rows", "range", *file.keys}}
    except UserError as error:
        warn(console, f"a damaged cache entry is computed again: {error}")
        return False
    for output in extractor.outputs:
        feature = extractor.name, output
        if f"{output}.mean" in arrays:
            measured.moments[feature] = arrays[f"{output}.mean"], arrays[f"{output}.covariance"]
        if f"{output}.kept" in arrays:
            measured.kept[feature] = torch.from_numpy(arrays[f"{output}.kept"])
    digests = arrays["digests"].tobytes()
    measured.digests = [digests[i : i + 16] for i in range(0, len(digests), 16)]
    measured.columns, measured.rows = arrays["columns"], arrays["rows"]
    measured.low, measured.high = arrays["range"].tolist()
    return True
