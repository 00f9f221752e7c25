"""A comparison: every contender trained with several seeds, measured the same way, one report at the end."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from ..arguments import StudyArguments
from ..data import Source, open_source
from ..errors import UserError
from ..files import file_sha256, writing
from ..images import grid
from ..pipeline import DiPPipeline
from ..processes import Processes, choose_precision, start_processes
from ..provenance import environment
from ..recipe import Recipe, load_recipe, recipe_values
from ..run_folder import training_rate
from ..sampling import SampledImages, load_pipeline
from ..terminal import clock, say, some
from ..training import train
from .folder import COSTS, RESULT, SAMPLES, alone_in, check_report, claim, read_json, write_result
from .measures import evaluator_of, measure_costs, measure_quality
from .study import Contender, Study, changed, contender_recipe

GRID_IMAGES = 18


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How the trained contenders of a study are compared.

    Args:
        measure: given a run's folder, its pipeline, recipe, the held-out images and the processes, all of which call
            it, returns what goes into the run's result.
        report: given the study, its folder, the contenders and the number of seeds, writes the report and returns
            the page.
        keeps: the file that `measure` leaves in a run's folder for the report.
        prepare: given the recipes of the contenders to train by name, called by all processes before the first
            training: what a measurement will need is there, or it raises.
        with_costs: whether parameters, FLOPs and latency are measured too.
        needs_classes: whether images without classes are refused.
    """

    measure: Callable[[Path, DiPPipeline, Recipe, Source, Processes, Console], dict[str, Any]]
    report: Callable[[Study, Path, Sequence[Contender], int], Path]
    keeps: str
    prepare: Callable[[Mapping[str, Recipe], Source, Processes, Console], object] | None = None
    with_costs: bool = False
    needs_classes: bool = False


def run_comparison(study: Study, comparison: Comparison, arguments: StudyArguments, console: Console) -> int:
    """Trains and measures what is not there yet; returns the exit status.

    Raises:
        UserError: if the folder holds a study of other settings or images, or the data cannot be used.
    """
    out, base = arguments.out, base_recipe(study, arguments)
    training, held_out = open_images(base, arguments)
    if comparison.needs_classes and len(held_out.class_names) < 2:
        raise UserError(f"the {study.name} study needs images of at least two classes, a sub-folder or label for each")
    contenders = chosen_contenders(study, arguments)
    held_out_from = {"source": arguments.held_out or base.data.source, "split": arguments.held_out_split}
    found = alone_in(arguments.device, console, lambda _: contents(training, held_out, base))
    facts = {
        "study": study.name,
        "scale": arguments.scale,
        "held_out": held_out_from,
        "recipe": recipe_values(base),
        "contents": found,
    }
    runs = [
        (contender, seed, out / "runs" / f"{contender.name}-seed{seed}")
        for seed in range(arguments.seeds)
        for contender in contenders
    ]
    missing = [run for run in runs if not all((run[2] / file).is_file() for file in (RESULT, comparison.keeps))]
    if missing and comparison.prepare:
        to_train = {contender.name: contender_recipe(base, contender, 0, base.out) for contender, _, _ in missing}
        with start_processes(base.training.device) as processes:
            comparison.prepare(to_train, held_out, processes, console)

    def begin(_: Processes) -> None:  # not before mistakes have been told
        claim(out, facts)
        there = {path.parent.name for path in out.glob(f"runs/*/{RESULT}")}
        check_report(out, there, {folder.name for _, _, folder in runs})

    alone_in(arguments.device, console, begin)
    began = time.perf_counter()
    for done_here, (contender, seed, folder) in enumerate(missing):
        left = (time.perf_counter() - began) / done_here * (len(missing) - done_here) if done_here else None
        remaining = "" if left is None else f", {clock(left)} left"
        number = runs.index((contender, seed, folder)) + 1
        console.rule(f"run {number} of {len(runs)}: {contender.label}, seed {seed}{remaining}", align="left")
        recipe = contender_recipe(base, contender, seed, str(folder))
        outcome = train(recipe, console)
        if outcome.status:
            return outcome.status
        _measure(comparison, folder, recipe, held_out, {"contender": contender.name, "seed": seed}, console)

    def conclude(processes: Processes) -> Path:
        if comparison.with_costs:
            recipes = {c.name: contender_recipe(base, c, 0, base.out) for c in contenders}
            _costs(out, recipes, len(held_out.class_names), processes)
        return comparison.report(study, out, contenders, arguments.seeds)

    page = alone_in(arguments.device, console, conclude)
    say(console, f"done; open {page}")
    return 0


def chosen_contenders(study: Study, arguments: StudyArguments) -> tuple[Contender, ...]:
    """The contenders asked for, in the study's order.

    Raises:
        UserError: if there is none of a name.
    """
    contenders = study.contenders(arguments.scale)
    names = [contender.name for contender in contenders]
    for name in arguments.contenders:
        if name not in names:
            raise UserError(f"--contenders {name}: the {study.name} study has {', '.join(names)}")
    return tuple(c for c in contenders if c.name in (arguments.contenders or names))


def base_recipe(study: Study, arguments: StudyArguments) -> Recipe:
    """The scale's recipe with the study's changes, or the user's recipe; with what the user's flags change in it.

    Raises:
        UserError: if the recipe is none, or fine-tunes.
    """
    recipe = load_recipe(arguments.recipe or f"study-{arguments.scale}")
    if recipe.model.pretrained:
        raise UserError(f"{arguments.recipe}: contenders start from the beginning; leave model.pretrained out")
    data = {} if arguments.recipe else dict(study.data.get(arguments.scale, {}))
    asked = {"source": arguments.data, "split": arguments.split}
    recipe = changed(recipe, "data", data | {key: value for key, value in asked.items() if value})
    if arguments.reference:
        recipe = changed(recipe, "evaluation", {"reference": arguments.reference})
    if arguments.images:
        recipe = changed(recipe, "evaluation", {"images": arguments.images})
    training = {"device": arguments.device, **({"steps": arguments.steps} if arguments.steps else {})}
    return changed(recipe, "training", training)


def open_images(recipe: Recipe, arguments: StudyArguments) -> tuple[Source, Source]:
    """The training images, and those no contender trains on, of the same classes."""
    if not recipe.data.source:
        raise UserError("--data is missing: name the training images; the recipe has none of its own")
    try:
        training = open_source(recipe.data)
    except UserError as error:
        raise UserError(f"--data {error}") from error
    section = dataclasses.replace(
        recipe.data, source=arguments.held_out or recipe.data.source, split=arguments.held_out_split
    )
    try:
        held_out = open_source(section)
    except UserError as error:
        raise UserError(
            f"held-out images: {error}; name images that are not trained on, --held-out SOURCE --held-out-split SPLIT"
        ) from error
    if held_out.class_names != training.class_names:
        raise UserError(
            f"held-out images: their classes are {some(held_out.class_names, 5) or 'none'}, the training images' are "
            f"{some(training.class_names, 5) or 'none'}; they must be the same"
        )
    return training, held_out


def contents(training: Source, held_out: Source, recipe: Recipe) -> dict[str, str]:
    """SHA-256 of the files' bytes and classes, by set: with other images it is another study.

    Raises:
        UserError: if a held-out image is a training image, too.
    """
    trained, held = training.hashes(), held_out.hashes()
    places = {hash_: i for i, hash_ in enumerate(trained) if hash_}
    if both := [i for i, hash_ in enumerate(held) if hash_ in places]:
        ours, theirs = held_out.read(both[0])[2], training.read(places[held[both[0]]])[2]
        raise UserError(
            f"held-out images: {len(both)} of {len(held)} are training images, too; {ours} is the same file as "
            f"{theirs}. Hold out images that are not trained on"
        )
    found = {"training": _together(trained, training), "held_out": _together(held, held_out)}
    reference = Path(recipe.evaluation.reference)
    return found | ({"reference": f"sha256:{file_sha256(reference)}"} if reference.is_file() else {})


def _together(hashes: Sequence[bytes], images: Source) -> str:
    labels = images.labels()
    return "sha256:" + hashlib.sha256(b"".join(hashes) + (b"" if labels is None else labels.tobytes())).hexdigest()


def prepare_measures(recipes: Mapping[str, Recipe], held_out: Source, processes: Processes, console: Console) -> None:
    """Opens and measures the reference: a mistake in it, weights that are missing, or patches that are too large for a
    metric, cost no training."""
    evaluator = evaluator_of(next(iter(recipes.values())), held_out, None, processes, console)
    for name, recipe in recipes.items():
        if evaluator.lacks_borders(recipe.model.patch_size):
            raise UserError(
                f"{name}: its patches are as large as the images, {evaluator.height}x{evaluator.width}, which then "
                "show no borders: leave it out of --contenders, or boundary out of the recipe's evaluation.metrics"
            )


def _measure(
    comparison: Comparison,
    folder: Path,
    recipe: Recipe,
    held_out: Source,
    who: Mapping[str, Any],
    console: Console,
) -> None:
    with start_processes(recipe.training.device) as processes:
        pipeline = load_pipeline(str(folder), processes.device)
        measured = comparison.measure(folder, pipeline, recipe, held_out, processes, console)
        result = {
            **who,
            **measured,
            "images_per_second": training_rate(folder),
            "recipe": recipe_values(recipe),
            "environment": environment(processes),
        }
        processes.on_main(lambda: write_result(folder / RESULT, result))


def measure_contender(
    folder: Path, pipeline: DiPPipeline, recipe: Recipe, held_out: Source, processes: Processes, console: Console
) -> dict[str, Any]:
    """Quality, and a grid of samples beside the run: the `measure` of the paper's comparisons."""
    quality = measure_quality(pipeline, recipe, held_out, processes, console)
    precision = choose_precision(recipe.training.precision, processes.device)
    shown = SampledImages(pipeline, recipe.evaluation, range(GRID_IMAGES), precision=precision)
    processes.on_main(lambda: _save_grid(shown, folder / SAMPLES))
    return quality


def _save_grid(images: SampledImages, path: Path) -> None:
    with writing(path):
        grid([Image.fromarray(pixels) for pixels in images.read(0, len(images))], 9).save(path)


def _costs(out: Path, recipes: Mapping[str, Recipe], num_classes: int, processes: Processes) -> None:
    if (out / COSTS).is_file() and read_json(out / COSTS)["costs"].keys() >= recipes.keys():
        return
    measured = measure_costs(recipes, num_classes, processes.device)
    write_result(out / COSTS, {"costs": measured, "environment": environment(processes)})
