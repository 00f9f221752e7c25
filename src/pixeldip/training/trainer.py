"""A run: what it starts from, its steps, and what is kept and said of them."""

import contextlib
import dataclasses
import itertools
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from ..data import Batches, EpochOrder, PositionSampler, TrainingImages
from ..model import DiP, network_config
from ..processes import Processes, autocast, start_processes
from ..provenance import restart
from ..recipe import Recipe
from ..run_folder import NETWORK, PIPELINE
from ..saved_model import check_saved_model
from ..terminal import PlainConsole, say, warn
from .checkpoint import Checkpoints, load_checkpoint, sound_checkpoint
from .divergence import Watch, check_divergence
from .evaluation import TrainingEvaluator
from .failures import explaining_failures
from .learner import Learner
from .preparation import (
    build_model,
    changed_rate,
    check_data,
    check_out,
    check_recipe,
    check_resume,
    introduce,
    left_out_evaluation,
    not_compared,
    open_data,
    prepare_run_folder,
    seeded_initialisation,
    untrained_guidance,
)
from .pretrained import add_adapters, check_adapted, load_pretrained, read_start, start_from
from .preview import save_preview
from .progress import Progress
from .run_lock import only_run
from .schedule import is_due
from .sharding import whole_model

IMPATIENT_SECONDS = 3  # between two Ctrl-C, from which on the second one ends the run without saving


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: the steps done, and the signal that stopped it early, if one did."""

    run: Path
    step: int
    interrupted_by: int | None = None

    @property
    def status(self) -> int:
        """What a command that trains ends with: 0, or what shells call one that a signal has ended."""
        return 0 if self.interrupted_by is None else 128 + self.interrupted_by


def train(recipe: Recipe, console: Console | None = None) -> Outcome:
    """Trains, or resumes the run found in `recipe.out`.

    SIGINT and SIGTERM end the run after the current step with a checkpoint, and so does a reader of the output that
    closes the pipe.

    Raises:
        UserError: before any work if the recipe cannot be run, or another process trains in its folder; later if
            data, loss, memory, storage or another process break down.
    """
    console = console or PlainConsole()
    check_out(recipe)
    run = Path(recipe.out)
    with (
        start_processes(recipe.training.device) as processes,
        contextlib.ExitStack() as stack,
        explaining_failures(recipe, processes),
    ):
        processes.on_main(lambda: stack.enter_context(only_run(run)))
        console.quiet |= not processes.is_main
        return _run(recipe, run, processes, console)


def _run(recipe: Recipe, run: Path, processes: Processes, console: Console) -> Outcome:
    training = recipe.training
    check_resume(run, recipe)
    gone = processes.on_main(lambda: not_compared(run))
    checkpoint, damaged = processes.on_main(lambda: sound_checkpoint(run))
    pretrained, trained, start = None, None, None
    if recipe.model.pretrained and checkpoint:
        check_saved_model(checkpoint / PIPELINE)
        trained = network_config(DiP.load_config(checkpoint / PIPELINE / NETWORK))
        start = read_start(run)
    elif recipe.model.pretrained:
        pretrained = load_pretrained(recipe.model.pretrained, processes)
        trained = network_config(pretrained.model.config)
    check_recipe(recipe, processes.world_size, trained)
    source = open_data(recipe.data)
    data, changed = processes.on_main(lambda: check_data(run, source, recipe.data.accept_changes))
    model = build_model(recipe.model, len(source.class_names), training.seed, trained)
    if pretrained:
        start = start_from(recipe.model.pretrained, pretrained, model, source.class_names)
        if recipe.model.lora_rank:
            check_adapted(start)
    if recipe.model.lora_rank:
        with seeded_initialisation(training.seed, 2):
            add_adapters(model, recipe.model, train_classes=bool(start.classes_new))
    learner = Learner(recipe, model, processes)
    first_step = load_checkpoint(checkpoint, learner.network, learner.ema, learner.optimizer) if checkpoint else 0
    left_out = processes.on_main(lambda: left_out_evaluation(run, recipe, first_step))
    if first_step >= training.steps and not left_out:
        say(console, f"{run}: all {first_step} steps are done; raise --training.steps to go on")
        return Outcome(run, first_step)
    images = TrainingImages(source, recipe.data, training.seed)
    if images.fits_in_memory():
        images.load_into_memory(console)
    small_images = processes.on_main(images.warnings)
    changed_schedule = processes.on_main(lambda: changed_rate(run, recipe, first_step))
    if processes.is_main:
        prepare_run_folder(run, recipe, processes, first_step, start, data)
    unguided = untrained_guidance(recipe, source)
    changed_images = [f"data.source changed: {changed}"] if changed else []
    unused = [f"data.source {recipe.data.source}: {text}" for text in source.warnings]
    for warning in [*unused, *small_images, *gone, *damaged, *changed_schedule, *changed_images, *unguided]:
        warn(console, warning)
    introduce(console, recipe, model, source, processes, first_step, start)
    evaluator = None
    if recipe.evaluation.every:
        evaluator = TrainingEvaluator(recipe, source, model.config.patch_size, processes, console)
    started = {
        "step": first_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "damaged": damaged,
        "data": data["sha256"],
        "data_changed": changed,
    }
    return _steps(learner, images, evaluator, left_out, started, console)


def _steps(
    learner: Learner,
    images: TrainingImages,
    evaluator: TrainingEvaluator | None,
    left_out: bool,
    started: dict[str, Any],
    console: Console,
) -> Outcome:
    """The evaluation left out before them, the steps, and what is due after each."""
    recipe, processes, first_step = learner.recipe, learner.processes, started["step"]
    training, run = recipe.training, Path(recipe.out)
    height, width = images.size
    class_names, sampling = list(images.source.class_names), recipe.preview.pipeline_arguments()
    pipeline = {"height": height, "width": width, "class_names": class_names, "sampling": sampling}
    saved = Checkpoints(run, learner.network, learner.ema, learner.optimizer, pipeline, training.keep_last, processes)
    parts, share = training.gradient_accumulation, (processes.rank, processes.world_size)
    sampler = PositionSampler(training.batch_size, first_step, training.steps, parts, *share)
    stream = Batches(images, sampler, pin_memory=processes.device.type == "cuda")
    watch = Watch(training, EpochOrder(len(images), training.seed), processes)
    with _signals(console) as caught, contextlib.ExitStack() as stack:
        stack.callback(saved.abandon)
        progress = stack.enter_context(Progress(run, recipe, console, first_step, processes))
        if processes.is_main:
            progress.event("start", **started, **restart(processes))
        if left_out:
            began = time.perf_counter()
            progress.evaluation(first_step, evaluator.evaluate(whole_model(learner.ema.model), pipeline))
            progress.pause(time.perf_counter() - began)
        for step in range(first_step, training.steps):
            learner.step(step, itertools.islice(stream, parts), watch)

            done = step + 1
            logs, saves, previews, evaluates = (
                is_due(every, done, training.steps)
                for every in (training.log_every, training.save_every, recipe.preview.every, recipe.evaluation.every)
            )
            stops = processes.any(bool(caught)) if logs or processes.world_size == 1 else False
            stops &= done < training.steps  # after the last one the run is complete
            if logs or saves or stops:
                diverged = watch.look()
                progress.divergence(diverged)
                check_divergence(training, run, diverged)
                stream.look(processes, console)
                if means := watch.means():  # where it is resumed, too, so that a mean is of all steps since the last
                    progress.step(done, learner.flops, stream.waited, **means, lr=learner.learning_rate)

            began = time.perf_counter()
            if saves or stops or previews or evaluates:
                averaged = whole_model(learner.ema.model)
            if saves or stops:
                saved.save(done, averaged)
            if previews and processes.is_main:
                with autocast(processes.device, learner.precision):
                    save_preview(run, done, averaged, pipeline, recipe.preview)
            if evaluates and not stops:
                progress.evaluation(done, evaluator.evaluate(averaged, pipeline))
            progress.pause(time.perf_counter() - began)

            if stops:
                saved.wait()
                by = next(iter(caught), signal.SIGTERM)
                progress.event("interrupted", step=done, signal=by)
                processes.barrier()
                say(console, f"stopped after step {done}; the same command goes on from there")
                return Outcome(run, done, by)
        saved.wait()
        processes.barrier()
    return Outcome(run, training.steps)


@contextlib.contextmanager
def _signals(console: Console) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them, and SIGPIPE where the console's output is read no more.

    Terminals and schedulers send them to all processes of a run, and torchrun passes them on once more, so a repeated
    one says nothing new; but SIGINT seconds later is a person who will not wait.
    """
    caught: list[int] = []
    last = -math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last
        impatient = number in caught and number == signal.SIGINT and time.monotonic() - last > IMPATIENT_SECONDS
        caught.append(number)
        last = time.monotonic()
        if impatient:
            signal.default_int_handler(number, frame)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    if isinstance(console, PlainConsole):
        console.when_unread = lambda: caught.append(signal.SIGPIPE)
    try:
        yield caught
    finally:
        if isinstance(console, PlainConsole):
            console.when_unread = None
        for number, handler in previous.items():
            signal.signal(number, handler)
