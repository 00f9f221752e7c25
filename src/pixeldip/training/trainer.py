"""The training loop: batch -> objective -> gradient -> step -> average, and what stands around it."""

import contextlib
import dataclasses
import json
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import __version__
from ..data import Batch, PositionSampler, Source, TrainingImages, batches, check_broken, open_source
from ..errors import UserError
from ..flow import drop_classes, fold_seed, logit_normal_times, shift_times, uniform_times, velocity_loss
from ..images import display_scale, from_uint8, grid
from ..model import DiP, check_size
from ..model.presets import preset_config
from ..pipeline import DiPPipeline
from ..recipe import FlowSection, ModelSection, OptimizerSection, Recipe, image_size, load_recipe, recipe_values, save_recipe
from ..run_folder import ENVIRONMENT, PREVIEWS, RECIPE, newest_checkpoint, step_name
from .checkpoint import load_checkpoint, save_checkpoint
from .ema import EMA
from .processes import Processes, choose_precision, start_processes, stop_processes
from .progress import Progress, peak_flops, training_flops

# Randomness of a run is keyed by (seed, stream, position of the image in the run) and nothing else
_INIT, _SAMPLE = 2, 3
# What a resumed run may change: how long it goes on and how it is watched, not what is computed
_MAY_CHANGE = {"out", "preview", "logging", "data.workers", "data.in_memory", "data.max_broken"} | {
    f"training.{key}" for key in ("steps", "log_every", "save_every", "keep_last", "device", "gradient_checkpointing")
}


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
        check_recipe(recipe, processes.world_size)
        if not processes.is_main:
            console.quiet = True
        source = open_source(recipe.data)
        _check_resume(run, recipe)
        model = build_model(recipe.model, len(source.class_names), training.seed).to(processes.device)
        check_size(*image_size(recipe.data), model.config.patch_size)
        if training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        ema = EMA(model, training.ema_decay)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.optimizer.lr,
            betas=recipe.optimizer.betas,
            weight_decay=recipe.optimizer.weight_decay,
            fused=processes.device.type == "cuda",
        )
        checkpoint = newest_checkpoint(run)
        first_step = load_checkpoint(checkpoint, model, ema, optimizer) if checkpoint else 0
        if first_step >= training.steps:
            console.print(f"{run}: all {first_step} steps are done; raise --training.steps to go on")
            return Outcome(run, first_step)
        images = TrainingImages(source, recipe.data, training.seed)
        if images.fits_in_memory():
            images.load_into_memory(console)
        if processes.is_main:
            _prepare_run_folder(run, recipe, processes)
        _introduce(console, recipe, model, source, processes, first_step)
        return _loop(recipe, run, model, ema, optimizer, images, processes, first_step, console)
    finally:
        stop_processes()


def _loop(
    recipe: Recipe,
    run: Path,
    model: DiP,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    images: TrainingImages,
    processes: Processes,
    first_step: int,
    console: Console,
) -> Outcome:
    training, device, source = recipe.training, processes.device, images.source
    precision = choose_precision(training.precision, device)
    autocast = partial(torch.autocast, device.type, precision, enabled=precision != torch.float32)
    network: nn.Module = torch.compile(model) if training.compile else model
    if processes.world_size > 1:
        network = DistributedDataParallel(network)
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
    broken: dict[int, str] = {}
    loss_sum, steps_summed = torch.zeros((), device=device), 0
    model.train()
    with _signals() as caught, contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(run, recipe, console, first_step, device)) if processes.is_main else None
        if progress:
            progress.event("start", step=first_step, version=__version__, processes=processes.world_size, command=_command())
        for step in range(first_step, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optimizer, step, training.steps)
            for part in range(training.gradient_accumulation):
                batch = next(stream)
                _report_broken(batch, broken, source, recipe, console)
                last = part == training.gradient_accumulation - 1
                with contextlib.nullcontext() if last or processes.world_size == 1 else network.no_sync():
                    x = from_uint8(batch.images.to(device, non_blocking=True))
                    y, noise, t = draw(recipe.flow, batch, x, model.config.num_classes, training.seed)
                    with autocast():
                        loss = velocity_loss(network, x, y, noise, t).mean() / training.gradient_accumulation
                    loss.backward()
                loss_sum += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step)
            steps_summed += 1

            done = step + 1
            logs = done % training.log_every == 0 or done == training.steps
            saves = done % training.save_every == 0 or done == training.steps
            stops = processes.any(bool(caught)) if logs or processes.world_size == 1 else False
            if logs or saves or stops:
                mean_loss = (processes.mean(loss_sum) / steps_summed).item()
                loss_sum, steps_summed = torch.zeros((), device=device), 0
                if not math.isfinite(mean_loss):
                    raise UserError(
                        f"the loss became {mean_loss} by step {done}; nothing was saved since the last checkpoint. "
                        "Lower optimizer.lr, or set training.precision fp32, and start the command again"
                    )
                if progress:
                    lr = optimizer.param_groups[0]["lr"]
                    progress.step(done, flops, loss=mean_loss, lr=lr, gradient_norm=round(norm.item(), 6))
            if progress:
                began = time.perf_counter()
                if saves or stops:
                    save_checkpoint(run, done, model, ema, optimizer, pipeline, training.keep_last)
                if recipe.preview.every and (done % recipe.preview.every == 0 or done == training.steps):
                    with autocast():
                        _preview(run, done, ema, pipeline, recipe)
                progress.pause(time.perf_counter() - began)
            if stops:
                processes.barrier()
                console.print(f"stopped after step {done}; the same command goes on from there")
                return Outcome(run, done, next(iter(caught), signal.SIGTERM))
        processes.barrier()
    return Outcome(run, training.steps)


def check_recipe(recipe: Recipe, world_size: int) -> None:
    """Refuses what cannot work, before any data is opened.

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
    sizes = model_config(recipe.model, num_classes=1)
    check_size(*image_size(recipe.data), sizes["patch_size"])
    with torch.device("meta"):
        DiP(**sizes)


def model_config(section: ModelSection, num_classes: int) -> dict[str, Any]:
    """The `DiP` keywords of a recipe: its preset's row, with the sizes given beside it."""
    values = dataclasses.asdict(section)
    preset = values.pop("preset")
    given = {name: value for name, value in values.items() if value is not None}
    base = preset_config(preset) if preset else {"patch_size": 16}
    return {**base, **given, "num_classes": num_classes}


def build_model(section: ModelSection, num_classes: int, seed: int) -> DiP:
    """A freshly initialised model, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_seed(seed, _INIT))
        return DiP(**model_config(section, num_classes))


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, or a cosine down to 1%."""
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "constant":
        return section.lr * warmup
    return section.lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def draw(
    section: FlowSection, batch: Batch, x: Tensor, null_class: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels after class dropout (B,), noise like x, and times (B,): each row from its position in the run.

    So a batch split over processes, or taken up again after a crash, meets the same numbers.
    """
    noise, uniforms = torch.empty_like(x), torch.empty(len(x), 2, device=x.device)
    generator = torch.Generator(x.device)
    for i, position in enumerate(batch.positions):
        generator.manual_seed(fold_seed(seed, _SAMPLE, position))
        noise[i].normal_(generator=generator)
        uniforms[i].uniform_(generator=generator)
    if section.time_distribution == "uniform":
        t = uniform_times(uniforms[:, 0])
    else:
        t = logit_normal_times(uniforms[:, 0], section.time_mean, section.time_std)
    labels = batch.labels.to(x.device, non_blocking=True)
    return drop_classes(labels, uniforms[:, 1], section.class_dropout, null_class), noise, shift_times(t, section.time_shift)


@torch.no_grad()
def _preview(run: Path, step: int, ema: EMA, pipeline: dict[str, Any], recipe: Recipe) -> None:
    sampler = DiPPipeline(ema.model, **pipeline)
    num_classes, preview = ema.model.config.num_classes, recipe.preview
    columns = math.ceil(preview.images / num_classes) if 0 < num_classes < preview.images else math.isqrt(preview.images)
    labels = [i // columns % num_classes for i in range(preview.images)] if num_classes else None
    images = sampler(
        labels,
        num_inference_steps=preview.steps,
        solver=preview.solver,
        guidance_scale=preview.guidance,
        seeds=range(preview.images),
    ).images
    folder = run / PREVIEWS
    folder.mkdir(exist_ok=True)
    grid(images, columns, scale=display_scale(images[0].width, 64)).save(folder / f"{step_name(step)}.png")


def _report_broken(batch: Batch, broken: dict[int, str], source: Source, recipe: Recipe, console: Console) -> None:
    for index, why in batch.broken.items():
        if index not in broken:
            console.print(f"[yellow]skipped[/] ({len(broken) + 1} so far) {why}", highlight=False)
    broken.update(batch.broken)
    check_broken(broken, source, recipe.data)


def _check_resume(run: Path, recipe: Recipe) -> None:
    path = run / RECIPE
    if not path.is_file() or not newest_checkpoint(run):
        return
    ours, theirs = (_flatten(recipe_values(r)) for r in (recipe, load_recipe(str(path))))
    for key in ours:
        if ours[key] != theirs[key] and key not in _MAY_CHANGE and key.split(".")[0] not in _MAY_CHANGE:
            raise UserError(
                f"{run} holds a run with {key} = {theirs[key]}, and this one asks for {ours[key]}: "
                "resume with the same recipe, or choose another folder with --out"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _prepare_run_folder(run: Path, recipe: Recipe, processes: Processes) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, run / RECIPE)
    except OSError as error:
        raise UserError(f"out {run}: cannot be written ({error.strerror})") from error
    if not (run / ENVIRONMENT).exists():
        (run / ENVIRONMENT).write_text(json.dumps(environment(processes), indent=2) + "\n", encoding="utf-8")


def environment(processes: Processes) -> dict[str, Any]:
    """What made a run: command, versions, machine."""
    cuda = processes.device.type == "cuda"
    return {
        "command": _command(),
        "pixeldip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "datasets": datasets.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(processes.device) if cuda else processes.device.type,
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
    }


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _introduce(
    console: Console, recipe: Recipe, model: DiP, source: Source, processes: Processes, first_step: int
) -> None:
    height, width = image_size(recipe.data)
    precision = choose_precision(recipe.training.precision, processes.device)
    classes = f"{len(source.class_names)} classes" if source.class_names else "no classes"
    console.print(
        f"{len(source)} images, {classes}, at {height}x{width}; {model.num_parameters() / 1e6:.1f} M parameters; "
        f"{processes.world_size} x {processes.device.type}, {str(precision).removeprefix('torch.')}; "
        + (f"resumed in {recipe.out} after step {first_step}" if first_step else f"run folder {recipe.out}"),
        highlight=False,
    )


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
