"""Sample grids during training, always of the same seeds, from the averaged weights."""

import math
from pathlib import Path
from typing import Any

from ..images import display_scale, grid
from ..model import DiP
from ..pipeline import DiPPipeline
from ..recipe import PreviewSection
from ..run_folder import PREVIEWS, step_name


def preview_classes(images: int, num_classes: int) -> tuple[int, list[int] | None]:
    """The pictures in a row, and each picture's class."""
    few = 0 < num_classes < images
    columns = math.ceil(images / num_classes) if few else math.isqrt(images)
    rows = math.ceil(images / columns)
    return columns, [i // columns * num_classes // rows for i in range(images)] if num_classes else None


def save_preview(run: Path, step: int, model: DiP, pipeline: dict[str, Any], preview: PreviewSection) -> None:
    """Writes `previews/step-….png`: a row per class, of some of the classes, evenly, where there are more of them than
    rows; a square of images where there are none."""
    sampler = DiPPipeline(model, **pipeline)
    sampler.set_progress_bar_config(disable=True)
    columns, labels = preview_classes(preview.images, model.config.num_classes)
    images = sampler(labels, seeds=range(preview.images), **preview.pipeline_arguments()).images
    folder = run / PREVIEWS
    folder.mkdir(exist_ok=True)
    file = folder / f"{step_name(step)}.png"
    written = file.with_name(f".{file.name}")  # the app may be looking into the folder
    grid(images, columns, scale=display_scale(images[0].width, 64)).save(written)
    written.replace(file)
