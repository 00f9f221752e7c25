"""Sample grids during training, always of the same seeds, from the averaged weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import replacing
from ..images import display_scale, grid
from ..model import DiP
from ..pipeline import DiPPipeline
from ..recipe import PreviewSection
from ..run_folder import PREVIEWS, preview_files, step_name, step_of

SHOWN_WIDTH = 64  # screen pixels of a picture, or more
GAP = 2


def preview_classes(images: int, num_classes: int) -> tuple[int, list[int] | None]:
    """The pictures in a row, and each picture's class: those of a class in one row, of few images of many classes
    several classes beside each other, so that the sheet is no strip."""
    of_each = math.ceil(images / num_classes) if 0 < num_classes < images else math.isqrt(images)
    shown = math.ceil(images / of_each)
    beside = max(1, math.isqrt(shown // of_each))  # 1 wherever the sheet is a square already
    return of_each * beside, [i // of_each * num_classes // shown for i in range(images)] if num_classes else None


def save_preview(run: Path, step: int, model: DiP, pipeline: dict[str, Any], preview: PreviewSection) -> None:
    """Writes `previews/step-….png`: the classes in order, or some of them, evenly, if not all have room in rows of
    equal length; a square of images where there are none."""
    sampler = DiPPipeline(model, **pipeline)
    sampler.set_progress_bar_config(disable=True)
    columns, labels = preview_classes(preview.images, model.config.num_classes)
    images = sampler(labels, seeds=range(preview.images), **preview.pipeline_arguments()).images
    folder = run / PREVIEWS
    folder.mkdir(exist_ok=True)
    sheet = grid(images, columns, gap=GAP, scale=display_scale(images[0].width, SHOWN_WIDTH))
    with replacing(folder / f"{step_name(step)}.png") as partial:  # the app may be looking into the folder
        sheet.save(partial, "PNG")


def read_previews(run: Path, size: tuple[int, int], images: int) -> dict[int, list[np.ndarray]]:
    """The pictures of a run's previews by step, uint8 (H, W, 3) each.

    Args:
        size: (height, width) of a picture.
        images: in a preview.
    """
    (height, width), scale = size, display_scale(size[1], SHOWN_WIDTH)
    across, down = width * scale + GAP, height * scale + GAP
    found = {}
    for path in preview_files(run):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        columns = (sheet.shape[1] + GAP) // across
        places = [(i // columns * down, i % columns * across) for i in range(images)]
        cut = [sheet[top : top + height * scale, left : left + width * scale] for top, left in places]
        found[step_of(path)] = [picture[::scale, ::scale] for picture in cut]
    return found
