"""The training loop: batch -> objective -> gradient -> step -> average, and what stands around it."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import (
    Batches,
    EpochOrder,
    PositionSampler,
    TrainingImages,
    check_broken,
    open_source,
    report_broken,
)
from ..images import from_uint8
from ..model import DiP
from ..processes import Processes, autocast, choose_precision, start_processes, stop_processes
from ..provenance import restart
from ..recipe import Recipe, image_size
from ..run_folder import NETWORK, PIPELINE
from ..saved_model import check_saved_model
from ..terminal import PlainConsole, warn
from .alignment import AlignedDiP, Alignment, load_alignment
from .checkpoint import Checkpoints, load_checkpoint, sound_checkpoint
from .devices import peak_flops
from .divergence import Watch, check_divergence, spreading
from .ema import EMA
from .failures import explained
from .loss import training_loss
from .metrics import TrainingMetrics
from .preparation import (
    build_model,
    check_data,
    check_recipe,
    check_resume,
    introduce,
    prepare_run_folder,
    seeded_initialisation,
)
from .pretrained import add_adapters, load_pretrained, network_config, read_start, start_from
from .preview import save_preview
from .progress import Progress, training_flops
from .run_lock import only_run
from .schedule import draw, learning_rate
from .sharding import is_sharded, shard, whole_model, whole_tensor

IMPATIENT_SECONDS = 3  # between two Ctrl-C, from which on the second one ends the run without saving


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: the steps done, and the signal that stopped it early, if one did."""

    run: Path
    step: int
    interrupted_by: int | None = None


def train(recipe: Recipe, console: Console | None = None) -> Outcome:
    """Trains, or resumes the run found in `recipe.out`.

    SIGINT and SIGTERM end the run after the current step with a checkpoint.

    Raises:
        UserError: before any work if the recipe cannot be run, or another process trains in its folder; later if
            data, loss, memory, storage or another process break down.
    """
    console = console or PlainConsole()
    run = Path(recipe.out)
    processes = start_processes(recipe.training.device)
    try:
        with contextlib.ExitStack() as stack, explained(recipe, processes):
            processes.on_main(lambda: stack.enter_context(only_run(run)))
            console.quiet |= not processes.is_main
            return _run(recipe, run, processes, console)
    finally:
        stop_processes()


def _run(recipe: Recipe, run: Path, processes: Processes, console: Console) -> Outcome:
    training = recipe.training
    check_resume(run, recipe)
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
    source = open_source(recipe.data)
    data, changed = processes.on_main(lambda: check_data(run, source, recipe.data.accept_changes))
    model = build_model(recipe.model, len(source.class_names), training.seed, trained)
    if pretrained:
        start = start_from(recipe.model.pretrained, pretrained, model, source.class_names)
    if recipe.model.lora_rank:
        with seeded_initialisation(training.seed, 2):
            add_adapters(model, recipe.model, train_classes=bool(start.classes_new))
    if training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    network, alignment = model, None
    if recipe.alignment.weight:
        alignment = load_alignment(recipe.alignment, model.config.patch_size, processes)
        with seeded_initialisation(training.seed, 1):
            network = AlignedDiP(model, recipe.alignment, alignment.width)
    ema = EMA(model, training.ema_decay)
    flops = training_flops(model, *image_size(recipe.data)) if peak_flops(processes.device) else None
    for part in (network, ema.model):
        if training.shard and processes.world_size > 1:
            shard(part, processes, choose_precision(training.precision, processes.device))
        else:
            part.to(processes.device)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=recipe.optimizer.lr,
        betas=recipe.optimizer.betas,
        weight_decay=recipe.optimizer.weight_decay,
        fused=processes.device.type in ("cpu", "cuda"),
    )
    first_step = load_checkpoint(checkpoint, network, ema, optimizer) if checkpoint else 0
    if first_step >= training.steps:
        console.print(f"{run}: all {first_step} steps are done; raise --training.steps to go on", soft_wrap=True)
        return Outcome(run, first_step)
    images = TrainingImages(source, recipe.data, training.seed)
    if images.fits_in_memory():
        images.load_into_memory(console)
    if processes.is_main:
        prepare_run_folder(run, recipe, processes, first_step, start, data)
    for warning in [*damaged, *([f"data.source changed: {changed}"] if changed else [])]:
        warn(console, warning)
    introduce(console, recipe, model, source, processes, first_step, start)
    metrics = None
    if recipe.evaluation.every:
        metrics = TrainingMetrics(recipe, source, model.config.patch_size, processes, console)
    started = {
        "step": first_step,
        "resumed_from": checkpoint.name if checkpoint else None,
        "damaged": damaged,
        "data": data["sha256"],
        "data_changed": changed,
    }
    return _loop(
        recipe, run, model, network, alignment, ema, optimizer, images, metrics, processes, started, flops, console
    )


def _loop(
    recipe: Recipe,
    run: Path,
    model: DiP,
    network: DiP | AlignedDiP,
    alignment: Alignment | None,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    images: TrainingImages,
    metrics: TrainingMetrics | None,
    processes: Processes,
    started: dict[str, Any],
    flops: int | None,
    console: Console,
) -> Outcome:
    first_step = started["step"]
    training, device, source = recipe.training, processes.device, images.source
    precision = choose_precision(training.precision, device)
    sharded = is_sharded(network)
    parallel: nn.Module = torch.compile(network) if training.compile else network
    if processes.world_size > 1 and not sharded:
        parallel = DistributedDataParallel(parallel)
    height, width = images.size
    sampling = recipe.preview.pipeline_arguments()
    pipeline = {"height": height, "width": width, "class_names": list(source.class_names), "sampling": sampling}
    saved = Checkpoints(run, network, ema, optimizer, pipeline, training.keep_last, processes)
    sampler = PositionSampler(
        training.batch_size,
        first_step,
        training.steps,
        training.gradient_accumulation,
        processes.rank,
        processes.world_size,
    )
    stream = Batches(images, sampler, pin_memory=device.type == "cuda")
    broken, newly_broken = dict(images.broken), {}
    watch = Watch(training, EpochOrder(len(source), training.seed), processes)
    network.train()
    with _signals() as caught, contextlib.ExitStack() as stack:
        stack.callback(saved.abandon)
        progress = (
            stack.enter_context(Progress(run, recipe, console, first_step, processes)) if processes.is_main else None
        )
        if progress:
            progress.event("start", **started, **restart(processes))
        for step in range(first_step, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optimizer, step, training.steps)
            for part in range(training.gradient_accumulation):
                batch = next(stream)
                newly_broken |= batch.broken
                last = part == training.gradient_accumulation - 1
                if sharded:
                    network.set_requires_gradient_sync(last)
                with contextlib.nullcontext() if last or processes.world_size == 1 or sharded else parallel.no_sync():
                    x = from_uint8(batch.images.to(device, non_blocking=True))
                    y, noise, t = draw(recipe.flow, model.objective, batch, x, model.config.num_classes, training.seed)
                    with autocast(device, precision):
                        losses = training_loss(parallel, model.objective, alignment, x, y, noise, t)
                    (spreading(losses["loss"]) / training.gradient_accumulation).backward()
                watch.part(losses)
            norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.optimizer.gradient_clip or math.inf)
            watch.step(step, optimizer, whole_tensor(norm))
            optimizer.zero_grad()
            ema.update(model, step)

            done = step + 1
            logs = done % training.log_every == 0 or done == training.steps
            saves = done % training.save_every == 0 or done == training.steps
            stops = processes.any(bool(caught)) if logs or processes.world_size == 1 else False
            if logs or saves or stops:
                diverged = watch.look()
                if progress:
                    progress.divergence(diverged)
                check_divergence(training, diverged)
                everyones = {row: why for found in processes.everyones(newly_broken) for row, why in found.items()}
                report_broken({row: why for row, why in everyones.items() if row not in broken}, console)
                broken, newly_broken = broken | everyones, {}
                check_broken(broken, source, recipe.data)
            if logs and (means := watch.means()) and progress:
                progress.step(done, flops, stream.waited, **means, lr=optimizer.param_groups[0]["lr"])
            previews = recipe.preview.every and (done % recipe.preview.every == 0 or done == training.steps)
            evaluates = metrics and not stops and (done % recipe.evaluation.every == 0 or done == training.steps)
            began = time.perf_counter()
            if saves or stops or previews or evaluates:
                averaged = whole_model(ema.model)
            if saves or stops:
                saved.save(done, averaged)
            if previews and progress:
                with autocast(device, precision):
                    save_preview(run, done, averaged, pipeline, recipe.preview)
            if evaluates:
                evaluation = metrics.measure(averaged, pipeline)
                if progress:
                    progress.evaluation(done, evaluation)
            if progress:
                progress.pause(time.perf_counter() - began)
            if stops:
                saved.wait()
                if progress:
                    progress.event("interrupted", step=done, signal=next(iter(caught), signal.SIGTERM))
                processes.barrier()
                console.print(f"stopped after step {done}; the same command goes on from there", soft_wrap=True)
                return Outcome(run, done, next(iter(caught), signal.SIGTERM))
        saved.wait()
        processes.barrier()
    return Outcome(run, training.steps)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them.

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
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
