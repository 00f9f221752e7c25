"""What an evaluation leaves behind: values, floors, the JSON record and the table in the terminal."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..data import NpzImages
from ..files import write_json, writing
from ..images import SETTINGS
from ..sampling import SampledImages
from ..terminal import say, warn
from .image_sets import ImageSet, SourceImages
from .reference import Reference
from .registry import METRICS, label
from .stream import Measured


@dataclass
class Evaluation:
    """The outcome.

    Attributes:
        metrics: values by name, unrounded.
        floors: what real images score, by name, where it is known; see `registry.floor`.
        warnings: what limits the numbers.
        record: everything needed to judge comparability; what the JSON file holds.
    """

    metrics: dict[str, float]
    floors: dict[str, dict[str, float]]
    warnings: list[str]
    record: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the record as JSON.

        Raises:
            UserError: if it cannot be written.
        """
        with writing(f"out {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.record)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The table for people: value, floor, and what limits them."""
    count = evaluation.record["samples"]["count"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "value", "samples*", "real"):
        table.add_column(title, justify="right" if title else "left")
    table.add_column("better", style="dim")
    for name, value in evaluation.metrics.items():
        metric, known = METRICS[name], evaluation.floors.get(name, {})
        parts = [scaled(known, part, metric.scale) for part in ("samples", "real")]
        patches = f", P = {evaluation.record['options']['patch_size']}" if name == "boundary" else ""
        table.add_row(label(name, count) + patches, f"{metric.scale * value:.4g}", *parts, metric.better)
    console.print(table)
    if any("samples" in known for known in evaluation.floors.values()):
        text = "* as many samples as real images, against the same part of the reference: compare these two columns"
        console.print(text, style="dim")
    if near := evaluation.record.get("nearest"):
        say(
            console,
            f"{near['closer_than_99_percent_of_real']:.1%} of the samples are nearer to a training image than all but "
            f"1% of the real images ({near['real_is']}); many more than 1% means copying",
        )
    for warning in evaluation.warnings:
        warn(console, warning)


def scaled(known: dict[str, float], part: str, scale: float) -> str:
    """An entry of a floor as text, with its deviation if it has one; empty if it is not there."""
    if part not in known:
        return ""
    deviation = known.get(f"{part}_deviation")
    return f"{scale * known[part]:.4g}" + (f" ± {scale * deviation:.2g}" if deviation is not None else "")


def made_with(images: ImageSet) -> dict[str, Any]:
    """How images were sampled, where that is recorded with them."""
    if isinstance(images, SampledImages):
        return images.made_with()
    if isinstance(images, NpzImages):
        return images.file.made_with
    settings = Path(images.name) / SETTINGS
    if settings.is_file():
        with contextlib.suppress(ValueError, RecursionError):  # a file of that name that is not ours
            values = json.loads(settings.read_text(encoding="utf-8"))
            return values if isinstance(values, dict) else {}
    return {}


def describe_samples(images: ImageSet, samples: Measured) -> dict[str, Any]:
    description: dict[str, Any] = {
        "name": images.name,
        "count": samples.count,
        "height": samples.height,
        "width": samples.width,
        "pixels_sha256": samples.pixels_sha256,
        "made_with": made_with(images),
    }
    if images.labels is not None:
        classes, counts = np.unique(images.labels, return_counts=True)
        per_class = dict(zip(map(str, classes.tolist()), counts.tolist()))
        description["classes"] = {"min": int(counts.min()), "max": int(counts.max()), "counts": per_class}
    if isinstance(images, SampledImages):
        description["uint8"] = "clip((x + 1) * 127.5 + 0.5, 0, 255), truncated"
    return description


def describe_reference(reference: Reference) -> dict[str, Any]:
    measured = reference.measured
    return {
        "name": reference.name,
        "sha256": reference.sha256,
        "images": len(reference.images) if reference.images is not None else 0,
        "size": [reference.images.height, reference.images.width] if reference.images is not None else None,
        "images_used_singly": len(measured.chosen) if measured else 0,
        "statistics_from_file": bool(reference.statistics),
        "features_from_cache": reference.from_cache,
        "made_with": dict(reference.made_with),
        "cropped_to_sample_size": isinstance(reference.images, SourceImages),
    }


def peak_memory_mib() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))
