"""The training loop: batch -> objective -> gradient -> step -> average, and what stands around it."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import __version__
from ..data import PositionSampler, TrainingImages, batches, check_broken, open_source, report_broken
from ..errors import UserError
from ..images import from_uint8
from ..model import DiP
from ..processes import Processes, autocast, choose_precision, start_processes, stop_processes
from ..provenance import command
from ..recipe import Recipe
from ..run_folder import NETWORK, PIPELINE, newest_checkpoint
from .alignment import AlignedDiP, Alignment, load_alignment
from .checkpoint import load_checkpoint, save_checkpoint
from .devices import peak_flops
from .ema import EMA
from .loss import training_loss
from .metrics import TrainingMetrics
from .preparation import (
    build_model,
    check_recipe,
    check_resume,
    introduce,
    prepare_run_folder,
    seeded_initialisation,
)
from .pretrained import add_adapters, load_pretrained, network_config, read_start, start_from
from .preview import save_preview
from .progress import Progress, training_flops
from .schedule import draw, learning_rate


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
        UserError: before any work if the recipe cannot be run; later if the data or loss break down.
    """
    console = console or Console()
    training = recipe.training
    run = Path(recipe.out)
    processes = start_processes(training.device)
    try:
        if not processes.is_main:
            console.quiet = True
        check_resume(run, recipe)
        checkpoint = newest_checkpoint(run)
        pretrained, trained, start = None, None, None
        if recipe.model.pretrained and checkpoint:
            trained = network_config(DiP.load_config(checkpoint / PIPELINE / NETWORK))
            start = read_start(run)
        elif recipe.model.pretrained:
            pretrained = load_pretrained(recipe.model.pretrained, processes)
            trained = network_config(pretrained.model.config)
        check_recipe(recipe, processes.world_size, trained)
        source = open_source(recipe.data)
        model = build_model(recipe.model, len(source.class_names), training.seed, trained)
        if pretrained:
            start = start_from(recipe.model.pretrained, pretrained, model, source.class_names)
        if recipe.model.lora_rank:
            with seeded_initialisation(training.seed, 2):
                add_adapters(model, recipe.model, train_classes=bool(start.classes_new))
        model.to(processes.device)
        if training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        ema = EMA(model, training.ema_decay)
        network, projector, alignment = model, None, None
        if recipe.alignment.weight:
            alignment = load_alignment(recipe.alignment, model.config.patch_size, processes)
            with seeded_initialisation(training.seed, 1):
                network = AlignedDiP(model, recipe.alignment, alignment.width).to(processes.device)
            projector = network.projector
        optimizer = torch.optim.AdamW(
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            lr=recipe.optimizer.lr,
            betas=recipe.optimizer.betas,
            weight_decay=recipe.optimizer.weight_decay,
            fused=processes.device.type in ("cpu", "cuda"),
        )
        first_step = load_checkpoint(checkpoint, model, ema, optimizer, projector) if checkpoint else 0
        if first_step >= training.steps:
            console.print(f"{run}: all {first_step} steps are done; raise --training.steps to go on", soft_wrap=True)
            return Outcome(run, first_step)
        images = TrainingImages(source, recipe.data, training.seed)
        if images.fits_in_memory():
            images.load_into_memory(console)
        if processes.is_main:
            prepare_run_folder(run, recipe, processes, start)
        introduce(console, recipe, model, source, processes, first_step, start)
        metrics = None
        if recipe.evaluation.every:
            metrics = TrainingMetrics(recipe, source, model.config.patch_size, processes, console)
        return _loop(
            recipe, run, model, network, alignment, ema, optimizer, images, metrics, processes, first_step, console
        )
    finally:
        stop_processes()


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
    first_step: int,
    console: Console,
) -> Outcome:
    training, device, source = recipe.training, processes.device, images.source
    precision = choose_precision(training.precision, device)
    projector = network.projector if alignment else None
    parallel: nn.Module = torch.compile(network) if training.compile else network
    if processes.world_size > 1:
        parallel = DistributedDataParallel(parallel)
    height, width = images.size
    flops = training_flops(model, height, width) if peak_flops(device) else None
    pipeline = {"height": height, "width": width, "class_names": list(source.class_names)}
    sampler = PositionSampler(
        training.batch_size,
        first_step,
        training.steps,
        training.gradient_accumulation,
        processes.rank,
        processes.world_size,
    )
    stream = batches(images, sampler, pin_memory=device.type == "cuda")
    broken = dict(images.broken)
    sums: dict[str, torch.Tensor] = {}
    steps_summed = 0
    network.train()
    with _signals() as caught, contextlib.ExitStack() as stack:
        progress = (
            stack.enter_context(Progress(run, recipe, console, first_step, processes)) if processes.is_main else None
        )
        if progress:
            progress.event(
                "start", step=first_step, version=__version__, processes=processes.world_size, command=command()
            )
        for step in range(first_step, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optimizer, step, training.steps)
            for part in range(training.gradient_accumulation):
                batch = next(stream)
                report_broken({i: why for i, why in batch.broken.items() if i not in broken}, console)
                broken |= batch.broken
                check_broken(broken, source, recipe.data)
                last = part == training.gradient_accumulation - 1
                with contextlib.nullcontext() if last or processes.world_size == 1 else parallel.no_sync():
                    x = from_uint8(batch.images.to(device, non_blocking=True))
                    y, noise, t = draw(recipe.flow, model.objective, batch, x, model.config.num_classes, training.seed)
                    with autocast(device, precision):
                        losses = training_loss(parallel, model.objective, alignment, x, y, noise, t)
                    (losses["loss"] / training.gradient_accumulation).backward()
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0) + value.detach() / training.gradient_accumulation
            norm = nn.utils.clip_grad_norm_(network.parameters(), recipe.optimizer.gradient_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step)
            steps_summed += 1

            done = step + 1
            logs = done % training.log_every == 0 or done == training.steps
            saves = done % training.save_every == 0 or done == training.steps
            stops = processes.any(bool(caught)) if logs or processes.world_size == 1 else False
            if logs or saves or stops:
                means = {name: (processes.mean(sums[name].clone()) / steps_summed).item() for name in sums}
                if not math.isfinite(means["loss"]):
                    raise UserError(
                        f"the loss became {means['loss']} by step {done}; nothing was saved since the last checkpoint. "
                        "Lower optimizer.lr, or set training.precision fp32, and start the command again"
                    )
            if logs:
                sums.clear()
                steps_summed = 0
                if progress:
                    lr = optimizer.param_groups[0]["lr"]
                    progress.step(done, flops, **means, lr=lr, gradient_norm=round(norm.item(), 6))
            began = time.perf_counter()
            if progress:
                if saves or stops:
                    save_checkpoint(run, done, model, ema, optimizer, pipeline, training.keep_last, projector)
                if recipe.preview.every and (done % recipe.preview.every == 0 or done == training.steps):
                    with autocast(device, precision):
                        save_preview(run, done, ema.model, pipeline, recipe.preview)
            if metrics and not stops and (done % recipe.evaluation.every == 0 or done == training.steps):
                evaluation = metrics.measure(ema.model, pipeline)
                if progress:
                    progress.evaluation(done, evaluation)
            if progress:
                progress.pause(time.perf_counter() - began)
            if stops:
                processes.barrier()
                console.print(f"stopped after step {done}; the same command goes on from there", soft_wrap=True)
                return Outcome(run, done, next(iter(caught), signal.SIGTERM))
        processes.barrier()
    return Outcome(run, training.steps)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; the second one of a kind takes effect at once."""
    caught: list[int] = []

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
