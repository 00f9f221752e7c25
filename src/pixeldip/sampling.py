"""Sampling to a folder: seeds dealt over classes, PNG files that say how they were made."""

import json
import time
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import __version__
from .errors import UserError
from .images import display_scale, grid
from .pipeline import DiPPipeline
from .training.processes import autocast, choose_device, choose_precision

GRID_LIMIT = 256


def parse_seeds(text: str) -> list[int]:
    """ "7", "0-15" or "0-7,20" -> a list of seeds.

    Raises:
        UserError: if it is anything else.
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise UserError(f"seeds {text!r}: expected numbers and ranges, for instance 0-15 or 3,7,20-29") from None
    if not seeds:
        raise UserError(f"seeds {text!r}: the range is empty; write the smaller number first")
    return seeds


def sample_to_folder(
    model: str,
    out: Path,
    classes: tuple[str, ...],
    seeds: str,
    steps: int,
    solver: str,
    guidance: float,
    guidance_interval: tuple[float, float],
    time_shift: float,
    height: int | None,
    width: int | None,
    batch_size: int,
    device: str,
    precision: str,
) -> None:
    """Writes an image per seed, `grid.png` of the first ones and `settings.json`.

    Image i has seed i of the list and class i modulo the number of classes; batch size and
    device do not change which image that is.

    Raises:
        UserError: if an argument is out of range or the folder cannot be written.
    """
    seed_list = parse_seeds(seeds)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: must be at least 1")
    where = choose_device(device)
    dtype = choose_precision(precision, where)
    diffusers_logging.disable_progress_bar()  # of loading one component
    pipeline = DiPPipeline.from_pretrained(model).to(where)
    num_classes = pipeline.model.config.num_classes
    chosen = [pipeline.class_id(name) for name in classes] or list(range(num_classes))
    labels = [chosen[i % len(chosen)] for i in range(len(seed_list))] if chosen else None
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "solver": solver,
        "guidance_scale": guidance,
        "guidance_interval": guidance_interval,
        "time_shift": time_shift,
        "height": height,
        "width": width,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {out}: cannot be written ({error.strerror})") from error
    names = pipeline.config.class_names
    began, images = time.perf_counter(), []
    columns = (TextColumn("Sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console) as progress:
        batches = range(0, len(seed_list), batch_size)
        task = progress.add_task("", total=len(batches) * steps)
        for start in batches:
            part = slice(start, start + batch_size)
            with autocast(where, dtype):
                output = pipeline(
                    labels[part] if labels else None,
                    seeds=seed_list[part],
                    on_step=lambda _: progress.advance(task),
                    **settings,
                )
            for offset, image in enumerate(output.images, start):
                made_with = {"model": model, "seed": seed_list[offset], "version": __version__, **settings}
                if labels:
                    made_with["class"] = names[labels[offset]] if names else labels[offset]
                note = PngInfo()
                note.add_text("pixeldip", json.dumps(made_with))
                image.save(out / f"{offset:06d}.png", pnginfo=note)
            images += output.images[: GRID_LIMIT - len(images)]
    across = min(len(images), len(chosen) if 1 < len(chosen) <= 16 else 8)
    grid(images, across, scale=display_scale(images[0].width)).save(out / "grid.png")
    record = {"pixeldip": __version__, "model": model, "seeds": seeds, "classes": chosen, **settings}
    (out / "settings.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - began
    console.print(
        f"{len(seed_list)} images in {seconds:.1f} s ({len(seed_list) / seconds:.2f} a second): {out}/grid.png"
    )
