"""A comparison: every contender trained with several seeds, measured the same way, one report at the end."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from ..data import Source, open_source
from ..errors import UserError
from ..images import grid
from ..processes import Processes, choose_precision, start_processes, stop_processes
from ..provenance import environment
from ..recipe import Recipe, load_recipe, recipe_values
from ..sampling import SampledImages, load_pipeline
from ..terminal import clock
from ..training import train
from .comparison_report import write_report
from .folder import claim, write_json
from .measures import measure_costs, measure_quality, training_rate
from .study import Study, changed, contender_recipe

RESULT = "result.json"
COSTS = "costs.json"
SAMPLES = "samples.png"
GRID_IMAGES = 18


@dataclasses.dataclass
class ComparisonOptions:
    """What a user may choose about a comparison; see the command's arguments."""

    out: Path
    scale: str
    data: str
    split: str
    held_out: str
    held_out_split: str
    reference: str
    seeds: int
    steps: int | None
    device: str


def run_comparison(study: Study, options: ComparisonOptions, console: Console) -> int:
    """Runs what is not there yet; returns the exit status.

    Raises:
        UserError: if the folder holds a study of other settings, or the data cannot be used.
    """
    base = base_recipe(study, options)
    held_out = open_held_out(base, options)
    contenders = study.contenders(options.scale)
    held_out_from = {"source": options.held_out or base.data.source, "split": options.held_out_split}
    recipe = recipe_values(base)
    claim(options.out, {"study": study.name, "scale": options.scale, "held_out": held_out_from, "recipe": recipe})
    runs = [(contender, seed) for seed in range(options.seeds) for contender in contenders]
    began, done_here = time.perf_counter(), 0
    for number, (contender, seed) in enumerate(runs, start=1):
        folder = options.out / "runs" / f"{contender.name}-seed{seed}"
        if (folder / RESULT).is_file():
            continue
        left = sum(not (options.out / "runs" / f"{c.name}-seed{s}" / RESULT).is_file() for c, s in runs)
        remaining = f", {clock((time.perf_counter() - began) / done_here * left)} left" if done_here else ""
        console.rule(f"run {number} of {len(runs)}: {contender.label}, seed {seed}{remaining}", align="left")
        recipe = contender_recipe(base, contender, seed, str(folder))
        outcome = train(recipe, console)
        if outcome.interrupted_by is not None:
            return 128 + outcome.interrupted_by
        _measure(folder, recipe, held_out, {"contender": contender.name, "seed": seed}, console)
        done_here += 1
    processes = start_processes(options.device)
    try:
        if processes.is_main:
            recipes = {c.name: contender_recipe(base, c, 0, base.out) for c in contenders}
            _costs(options.out, recipes, len(held_out.class_names), processes)
            page = write_report(study, options.out, contenders, options.seeds)
            console.print(f"done; open {page}", highlight=False, soft_wrap=True)
        processes.barrier()
    finally:
        stop_processes()
    return 0


def base_recipe(study: Study, options: ComparisonOptions) -> Recipe:
    """The scale's recipe with the study's and the user's changes."""
    recipe = load_recipe(f"study-{options.scale}")
    changes = {**study.data.get(options.scale, {}), "split": options.split}
    recipe = changed(recipe, "data", {**changes, **({"source": options.data} if options.data else {})})
    if options.reference:
        recipe = changed(recipe, "evaluation", {"reference": options.reference})
    training = {"device": options.device, **({"steps": options.steps} if options.steps else {})}
    return changed(recipe, "training", training)


def open_held_out(recipe: Recipe, options: ComparisonOptions) -> Source:
    """The images no contender trains on, with the classes of the training images."""
    section = dataclasses.replace(
        recipe.data, source=options.held_out or recipe.data.source, split=options.held_out_split
    )
    try:
        held_out = open_source(section)
    except UserError as error:
        raise UserError(
            f"held-out images: {error}; name images that are not trained on, --held-out SOURCE --held-out-split SPLIT"
        ) from error
    training = open_source(recipe.data)
    if held_out.class_names != training.class_names:
        raise UserError(
            f"held-out images: their classes are {_some(held_out.class_names)}, the training images' are "
            f"{_some(training.class_names)}; they must be the same"
        )
    return held_out


def _some(names: tuple[str, ...], most: int = 5) -> str:
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
    )


def _measure(folder: Path, recipe: Recipe, held_out: Source, who: Mapping[str, Any], console: Console) -> None:
    processes = start_processes(recipe.training.device)
    try:
        pipeline = load_pipeline(str(folder), processes.device)
        quality = measure_quality(pipeline, recipe, held_out, processes, console)
        if processes.is_main:
            precision = choose_precision(recipe.training.precision, processes.device)
            shown = SampledImages(pipeline, recipe.evaluation, range(GRID_IMAGES), precision=precision)
            _grid(shown).save(folder / SAMPLES)
            write_json(
                folder / RESULT,
                {
                    **who,
                    **quality,
                    "images_per_second": training_rate(folder),
                    "recipe": recipe_values(recipe),
                    "environment": environment(processes),
                },
            )
    finally:
        stop_processes()


def _grid(images: SampledImages) -> Image.Image:
    return grid([Image.fromarray(pixels) for pixels in images.read(0, len(images))], 9)


def _costs(out: Path, recipes: Mapping[str, Recipe], num_classes: int, processes: Processes) -> None:
    if (out / COSTS).is_file():
        return
    measured = measure_costs(recipes, num_classes, processes.device)
    write_json(out / COSTS, {"costs": measured, "environment": environment(processes)})
