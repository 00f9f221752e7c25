"""What identifies a set of images without reading them: how many, of which classes, their names and sizes."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.compute as pc

from .sources import Source


def fingerprint(source: Source) -> dict[str, Any]:
    """Number, bytes and classes (name: images) of a source, and a digest of names, sizes and classes in their order.

    Names count from the folder that holds all files, and no dates enter: a set that was copied elsewhere is the same.
    """
    images = source.rows.data.column(source.image_column)
    names = [name or "" for name in pc.struct_field(images, "path").to_pylist()]
    sizes = pc.fill_null(pc.binary_length(pc.struct_field(images, "bytes")), -1).to_numpy().astype(np.int64)
    files = np.flatnonzero(sizes < 0)
    with ThreadPoolExecutor() as pool:
        sizes[files] = list(pool.map(_size, [names[i] for i in files]))
    folder = _common_folder([name for name in names if name]) if len(files) else ""
    labels = source.labels()
    everything = "\0".join(name.removeprefix(folder) for name in (*names, *source.no_files))
    digest = hashlib.sha256(everything.encode(errors="surrogateescape"))
    digest.update(sizes.tobytes())
    digest.update(b"" if labels is None else labels.tobytes())
    counts = [] if labels is None else np.bincount(labels[labels >= 0], minlength=len(source.class_names)).tolist()
    return {
        "images": len(source),
        "bytes": int(sizes.sum()),
        "classes": dict(zip(source.class_names, counts)),
        "sha256": digest.hexdigest(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a person would call the difference of two fingerprints; "" if there is none."""
    if before["sha256"] == now["sha256"] and before["classes"] == now["classes"]:
        return ""
    found = []
    if more := now["images"] - before["images"]:
        images = "image" if abs(more) == 1 else "images"
        which = "more" if more > 0 else "fewer"
        found.append(f"{abs(more)} {images} {which} ({before['images']}, now {now['images']})")
    if gone := [name for name in before["classes"] if name not in now["classes"]]:
        found.append(f"without the classes {', '.join(gone[:5])}{' …' * (len(gone) > 5)}")
    if new := [name for name in now["classes"] if name not in before["classes"]]:
        found.append(f"with the new classes {', '.join(new[:5])}{' …' * (len(new) > 5)}")
    kept = [n for n in before["classes"] if n in now["classes"] and before["classes"][n] != now["classes"][n]]
    if kept:
        counts = [f"{name} {before['classes'][name]}, now {now['classes'][name]}" for name in kept[:5]]
        found.append("; ".join(counts) + " …" * (len(kept) > 5))
    if [n for n in before["classes"] if n in now["classes"]] != [n for n in now["classes"] if n in before["classes"]]:
        found.append("the classes in another order")
    return ", ".join(found) or "as many images, but other names, sizes or order"


def _common_folder(names: list[str]) -> str:
    try:
        return os.path.commonpath([min(names), max(names)])
    except ValueError:  # none, or some from the root and some not
        return ""


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except (OSError, ValueError):  # ValueError: no name of a file, as strangers' tables may hold
        return -1
