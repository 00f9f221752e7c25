"""Before the first step: what is refused, what is built, what the run folder is told."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data import Source, changes, fingerprint, open_source
from ..errors import UserError
from ..files import write_json
from ..flow import Stream, check_interval, fold_seed
from ..model import DiP, check_size, preset_config
from ..pipeline import check_reuse
from ..processes import Processes, choose_precision, precision_name
from ..provenance import environment
from ..recipe import DataSection, ModelSection, Recipe, flatten, image_size, load_recipe, recipe_values, save_recipe
from ..run_folder import DATA, ENVIRONMENT, PREVIEWS, RECIPE, START, newest_checkpoint, read_evaluations, read_metrics
from ..saved_model import INDEX
from ..terminal import say
from .pretrained import Start
from .schedule import is_due, learning_rate

# What a resumed run may change: how long it goes on and how it is watched, not what is computed
# (what the images are is compared by their fingerprint, wherever they lie).
_MAY_CHANGE = {
    *("out", "preview", "evaluation", "logging", "optimizer.cooldown_steps"),
    *(f"data.{key}" for key in ("source", "workers", "timeout", "in_memory", "max_broken", "accept_changes")),
    *(f"training.{key}" for key in ("steps", "log_every", "save_every", "keep_last", "device")),
    *(f"training.{key}" for key in ("gradient_checkpointing", "gradient_accumulation", "shard")),
    *(f"training.{key}" for key in ("on_divergence", "gradient_limit", "skip_limit")),
}

_NO_SIZES = {"pretrained", "lora_rank", "lora_alpha"}


def check_out(recipe: Recipe) -> None:
    """Refuses a run folder among the images, or where a saved model is, before anything is written there.

    Raises:
        UserError: in one sentence.
    """
    source = Path(recipe.data.source).expanduser()
    if recipe.data.source and source.is_dir() and Path(recipe.out).resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"out {recipe.out}: lies in data.source {recipe.data.source}, and the run's samples would be trained on; "
            "choose a folder outside of it with --out, or move the images to one of their own"
        )
    if (Path(recipe.out) / INDEX).is_file():
        raise UserError(
            f"out {recipe.out}: holds a saved model, which would be taken for what the run trains; choose another "
            "folder with --out"
        )


def check_recipe(recipe: Recipe, world_size: int, trained: Mapping[str, Any] | None = None) -> None:
    """Refuses what cannot work, before any data is opened.

    Args:
        trained: the configuration of the model to start from, if there is one.

    Raises:
        UserError: in one sentence.
    """
    training = recipe.training
    share = world_size * training.gradient_accumulation
    if training.batch_size % share:
        raise UserError(
            f"training.batch_size {training.batch_size} cannot be split over {world_size} processes x "
            f"{training.gradient_accumulation} accumulation steps: it must be a multiple of {share}"
        )
    if recipe.flow.class_dropout == 1:
        raise UserError("flow.class_dropout 1 would drop every label; give a value below 1")
    for split, source in (("reference_split", "reference"), ("train_split", "train_images")):
        if getattr(recipe.evaluation, split) != "train" and not getattr(recipe.evaluation, source):
            raise UserError(
                f"evaluation.{split}: of which images? Name them, evaluation.{source}; without it those that are "
                "trained on stand in"
            )
    for tracker in recipe.logging.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"logging.trackers: {tracker} is not installed; pip install 'pixeldip[{tracker}]'")
    if recipe.model.lora_alpha and not recipe.model.lora_rank:
        raise UserError("model.lora_alpha: there are no adapters without a rank; give model.lora_rank, too")
    if recipe.model.lora_rank and not recipe.model.pretrained:
        raise UserError("model.lora_rank: adapters need a trained model; name it with model.pretrained")
    if recipe.model.lora_rank and recipe.alignment.weight:
        raise UserError("model.lora_rank and alignment.weight: adapters are trained without alignment; set it to 0")
    if recipe.model.lora_rank and recipe.training.shard:
        raise UserError("model.lora_rank and training.shard: adapters are small; train them without sharding")
    sizes = model_config(recipe.model, num_classes=1, trained=trained)
    check_size(*image_size(recipe.data), sizes["patch_size"])
    with torch.device("meta"):
        model = DiP(**sizes)
    for name in ("preview", "evaluation"):
        section = getattr(recipe, name)
        try:
            check_interval(section.guidance_interval)
            check_reuse(section.backbone_every, model)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    if recipe.alignment.weight and recipe.alignment.block > model.config.depth:
        raise UserError(f"alignment.block {recipe.alignment.block}: the model has {model.config.depth} blocks")


def open_data(section: DataSection) -> Source:
    """The images of a recipe.

    Raises:
        UserError: if there are none of that name, or none is given.
    """
    if not section.source:
        raise UserError("data.source is missing: give an image folder, for instance --data.source my-photos/")
    try:
        return open_source(section)
    except UserError as error:
        raise UserError(f"data.source {error}") from error


def model_config(section: ModelSection, num_classes: int, trained: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `DiP` keywords of a recipe: its preset's row, or the trained model's, with the sizes given beside it.

    Raises:
        UserError: if the trained model cannot be what the recipe asks for.
    """
    values = dataclasses.asdict(section)
    preset = values.pop("preset")
    given = {name: value for name, value in values.items() if value is not None and name not in _NO_SIZES}
    if trained is None:
        return {**(preset_config(preset) if preset else {"patch_size": 16}), **given, "num_classes": num_classes}
    if preset:
        raise UserError("model.preset and model.pretrained both say how large the model is; give one of them")
    asked = given.get("prediction", trained["prediction"])
    if asked != trained["prediction"]:
        raise UserError(
            f"model.prediction {asked}: the pretrained model predicts the {trained['prediction']}, and keeps doing so"
        )
    if given.get("head", trained["head"]) != trained["head"]:
        trained = {**trained, "head_width": None, "head_depth": None}
    return {**trained, **given, "num_classes": num_classes}


def build_model(section: ModelSection, num_classes: int, seed: int, trained: Mapping[str, Any] | None = None) -> DiP:
    """A freshly initialised model, the same for the same seed."""
    with seeded_initialisation(seed):
        return DiP(**model_config(section, num_classes, trained))


@contextlib.contextmanager
def seeded_initialisation(*seed: int) -> Iterator[None]:
    """In here modules draw their first weights from the seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(*seed[:1], Stream.INITIALISATION, *seed[1:]))
        yield


def check_resume(run: Path, recipe: Recipe) -> None:
    path = run / RECIPE
    if not path.is_file() or not newest_checkpoint(run):
        return
    ours, theirs = (flatten(recipe_values(r)) for r in (recipe, load_recipe(str(path))))
    for key in ours:
        if ours[key] != theirs[key] and key not in _MAY_CHANGE and key.split(".")[0] not in _MAY_CHANGE:
            raise UserError(
                f"{run} holds a run with {key} = {theirs[key]}, and this one asks for {ours[key]}: "
                "resume with the same recipe, or choose another folder with --out"
            )


def not_compared(run: Path) -> list[str]:
    """What is gone of a run that was begun in the folder, so that going on is not compared with its beginning."""
    if not newest_checkpoint(run):
        steps = read_metrics(run)
        return [f"{run}: no checkpoint of its {steps[-1]['step']} steps; it starts from the beginning"] if steps else []
    records = {RECIPE: "settings", DATA: "images"}
    return [
        f"{run / name} is gone: the {what} are not compared with those that the run began with"
        for name, what in records.items()
        if not (run / name).is_file()
    ]


def changed_rate(run: Path, recipe: Recipe, step: int) -> list[str]:
    """What to say where other steps than before throw the learning rate of a resumed run up or down."""
    if not step or not (run / RECIPE).is_file():
        return []
    before = load_recipe(str(run / RECIPE))
    was, would_be = (learning_rate(each.optimizer, step - 1, each.training.steps) for each in (before, recipe))
    if math.isclose(was, would_be, rel_tol=0.01):
        return []
    now = learning_rate(recipe.optimizer, step, recipe.training.steps)
    return [
        f"the learning rate was {was:.2g} at step {step} of {before.training.steps}, and goes on at {now:.2g}: it "
        f"follows the schedule of {recipe.training.steps} steps"
    ]


def left_out_evaluation(run: Path, recipe: Recipe, step: int) -> bool:
    """Whether the evaluation due at a run's last step was left out, for a signal or the end of its process."""
    steps = recipe.training.steps
    was_due = 0 < step <= steps and is_due(recipe.evaluation.every, step, steps)
    return was_due and all(entry["step"] != step for entry in read_evaluations(run))


def untrained_guidance(recipe: Recipe, source: Source) -> list[str]:
    """What to say where samples are guided by a class that stands for none and is never trained."""
    used = ["preview", *(["evaluation"] if recipe.evaluation.every else [])]  # preview's settings are the saved model's
    guided = [f"{name}.guidance" for name in used if getattr(recipe, name).guidance != 1]
    if recipe.flow.class_dropout or recipe.model.pretrained or not source.class_names or not guided:
        return []
    return [
        f"flow.class_dropout is 0, so what guidance steers away from is never trained: set {' and '.join(guided)} to 1"
    ]


def check_data(run: Path, source: Source, accept: bool) -> tuple[dict[str, Any], str]:
    """The fingerprint of the images, and what changed in them since the run began, "" if nothing did.

    Raises:
        UserError: if that was not accepted, other classes leave nothing to resume, or the record of them is damaged.
    """
    found = fingerprint(source)
    if not newest_checkpoint(run) or not (run / DATA).is_file():
        return found, ""
    try:
        before = json.loads((run / DATA).read_bytes())
        changed = changes(before, found)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{run / DATA}: damaged; delete it to go on, if you are sure that the images are those of the run"
        ) from error
    if list(before["classes"]) != list(found["classes"]):  # in order: a class is known to the model by its place
        raise UserError(
            f"data.source: {changed}; the model of {run} has other classes. Start another run from it, which finds "
            f"those of the same names: --model.pretrained {shlex.quote(str(run))} --out FOLDER"
        )
    if changed and not accept:
        raise UserError(
            f"data.source: not the images that {run} began with: {changed}. Put them back, or go on with them as they "
            "are: --data.accept-changes"
        )
    return found, changed


def prepare_run_folder(
    run: Path, recipe: Recipe, processes: Processes, first_step: int, start: Start | None, data: dict[str, Any]
) -> None:
    save_recipe(recipe, run / RECIPE)
    write_json(run / DATA, data)
    if start and not first_step:  # one that was left by a start that came to nothing is of other weights, perhaps
        write_json(run / START, start.record())
    if not first_step or not (run / ENVIRONMENT).exists():
        write_json(run / ENVIRONMENT, environment(processes))
    if not first_step and (run / PREVIEWS).exists():  # of a start whose checkpoints are gone, perhaps another network
        free = next(name for k in itertools.count(1) if not (name := run / f"{PREVIEWS}-before-{k}").exists())
        (run / PREVIEWS).rename(free)


def introduce(
    console: Console,
    recipe: Recipe,
    model: DiP,
    source: Source,
    processes: Processes,
    first_step: int,
    start: Start | None,
) -> None:
    height, width = image_size(recipe.data)
    precision = choose_precision(recipe.training.precision, processes.device)
    classes = f"{len(source.class_names)} classes" if source.class_names else "no classes"
    say(
        console,
        f"{len(source)} images, {classes}, at {height}x{width}; {model.num_parameters() / 1e6:.1f} M parameters; "
        f"{processes.world_size} x {processes.device.type}, {precision_name(precision)}; "
        + (f"resumed in {recipe.out} after step {first_step}" if first_step else f"run folder {recipe.out}"),
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sentences = start.sentences() if start and not first_step else []
    if recipe.model.lora_rank:
        sentences.append(f"LoRA: {trained / 1e6:.2f} M parameters are trained")
    for sentence in sentences:
        say(console, sentence)
