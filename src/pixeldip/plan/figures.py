"""What a recipe needs on a number of devices, computed from the recipe alone: no data is opened, nothing started."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import class_count
from ..errors import UserError
from ..model import DiP, network_config
from ..pipeline import DiPPipeline
from ..processes import precision_name
from ..recipe import Recipe
from ..run_folder import NETWORK, resolve_model
from ..settings import PlanOptions
from ..training.devices import DEVICES
from ..training.preparation import check_out, check_recipe, model_config
from ..training.pretrained import check_adapted, start_from
from .encoder import encoder_on_paper
from .step import PaperStep, size_of

USABLE = 0.9  # of a device's memory; the rest is CUDA's own, its libraries' workspaces and fragmentation
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Checkpoint:
    """Bytes of one checkpoint, and of all on disk while a new one is written beside the `keep_last` old ones."""

    training_state: int
    pipeline: int
    on_disk: int

    @property
    def whole(self) -> int:
        return self.training_state + self.pipeline


@dataclass(frozen=True)
class Row:
    """A number of devices. None: not known, since the batch cannot be split or the device's speed is not published.

    images: per device and pass. state, step: bytes on each device, of what stays and of the most that a pass adds.
    flops: of an optimizer step on all devices. seconds: of an optimizer step; run_seconds: of all of them.
    """

    devices: int
    images: int | None = None
    state: dict[str, int] | None = None
    step: int | None = None
    flops: int | None = None
    seconds: float | None = None
    run_seconds: float | None = None
    device_hours: float | None = None
    cost: float | None = None
    warning: str | None = None

    @property
    def memory(self) -> int | None:
        return None if self.state is None else sum(self.state.values()) + self.step


@dataclass(frozen=True)
class Plan:
    """parameters: by part; those of the encoder are frozen. notes: what was assumed."""

    recipe: Recipe
    config: dict[str, Any]
    parameters: dict[str, int]
    precision: str
    options: PlanOptions
    checkpoint: Checkpoint
    rows: list[Row]
    notes: list[str]


def plan(recipe: Recipe, options: PlanOptions) -> Plan:
    """What training takes on each number of devices.

    Raises:
        UserError: if the recipe cannot be trained on any number of devices, or the device is not known.
    """
    if options.device not in DEVICES:
        near = difflib.get_close_matches(options.device.upper(), DEVICES, n=1)
        hint = f"perhaps {near[0]!r}" if near else f"there are {', '.join(DEVICES)}"
        raise UserError(f"no device {options.device!r}; {hint}")
    notes = []
    check_out(recipe)
    trained = _trained_config(recipe)
    check_recipe(recipe, 1, trained)
    try:
        classes = class_count(recipe.data) if options.classes is None else options.classes
    except UserError as error:
        raise UserError(f"data.source {error}") from error
    if classes is None:
        classes = IMAGENET_CLASSES
        notes.append(f"{classes} classes, as in ImageNet: data.source does not show how many; --plan.classes does")
    encoder, said = encoder_on_paper(recipe.alignment) if recipe.alignment.weight else (None, None)
    notes += [said] if said else []
    precision = torch.float32 if recipe.training.precision == "fp32" else torch.bfloat16
    config = model_config(recipe.model, classes, trained)
    if trained:
        _check_start(recipe, trained, config)
    step = PaperStep(recipe, config, precision, encoder)
    sharded = PaperStep(recipe, config, precision, encoder, sharded=True) if recipe.training.shard else None
    if precision == torch.float32:
        notes.append("no times: the published speed is bf16's, and the recipe computes in fp32")
    else:
        notes.append("that share of the speed is a large language model's; small models stay far below it")
    return Plan(
        recipe,
        config,
        _parameters(step),
        precision_name(precision),
        options,
        checkpoint_size(recipe, step),
        [_row(recipe, sharded if sharded and n > 1 else step, options, n) for n in options.devices],
        notes,
    )


def _trained_config(recipe: Recipe) -> dict[str, Any] | None:
    """The configuration of the model to start from, if it lies on this machine."""
    name = recipe.model.pretrained
    if not name:
        return None
    folder = Path(resolve_model(name)) / NETWORK if Path(name).expanduser().is_dir() else None
    if folder is None:
        raise UserError(
            f"model.pretrained {name}: a plan reads the sizes of run folders and saved models of this machine only; "
            "give --model.preset, or the sizes, in its place"
        )
    return network_config(DiP.load_config(folder))


def _check_start(recipe: Recipe, trained: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Starts from the trained model on the meta device, where nothing is copied.

    Raises:
        UserError: if the run could not.
    """
    with torch.device("meta"):
        start = start_from(recipe.model.pretrained, DiPPipeline(DiP(**trained)), DiP(**config), class_names=())
    if recipe.model.lora_rank:
        check_adapted(start)


def _parameters(step: PaperStep) -> dict[str, int]:
    parts = {"model": step.model, "projector": step.projector, "encoder": step.encoder}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}


def state_bytes(step: PaperStep, devices: int) -> dict[str, int]:
    """Bytes that stay on each device from step to step.

    DistributedDataParallel holds all of it on every device, FSDP2 its share.
    """
    trained = _float32(p for p in step.network.parameters() if p.requires_grad)
    state = {
        "weights": _float32(step.network.parameters()),
        "average": _float32(step.model.parameters()),
        "AdamW": 2 * trained,
    }
    if step.sharded:
        state["gradients"] = trained
        state = {name: math.ceil(size / devices) for name, size in state.items()}
    elif devices > 1:
        state["buckets"] = trained  # DistributedDataParallel's own copy of the gradients
    if step.encoder is not None:
        state["encoder"] = size_of(step.encoder.parameters())
    return state


def _float32(parameters: Iterable[nn.Parameter]) -> int:
    return 4 * sum(parameter.numel() for parameter in parameters)


def checkpoint_size(recipe: Recipe, step: PaperStep) -> Checkpoint:
    """Of the tensors that `Checkpoints` writes, sharded or not."""
    state = state_bytes(step, devices=1)
    training_state = state["weights"] + state["AdamW"] + (state["average"] if recipe.model.lora_rank else 0)
    whole = training_state + state["average"]
    return Checkpoint(training_state, state["average"], (recipe.training.keep_last + 1) * whole)


def _row(recipe: Recipe, step: PaperStep, options: PlanOptions, devices: int) -> Row:
    training, published = recipe.training, DEVICES[options.device]
    passes = training.gradient_accumulation
    if training.batch_size % (devices * passes):
        return Row(devices, warning=_cannot_split(devices, training.batch_size, passes))
    images = training.batch_size // (devices * passes)
    state = state_bytes(step, devices)
    peak = step.peak_bytes(images, training.gradient_checkpointing, passes > 1)
    flops = passes * step.flops(images)
    warning = None
    if sum(state.values()) + peak > USABLE * published.memory:
        warning = _does_not_fit(recipe, step, options.device, devices, images, sum(state.values()), peak)
    row = Row(devices, images, state, peak, devices * flops, warning=warning)
    if step.precision == torch.float32:
        return row
    seconds = flops / (published.flops * options.utilisation)
    hours = devices * training.steps * seconds / 3600
    cost = None if options.price is None else options.price * hours
    return dataclasses.replace(
        row, seconds=seconds, run_seconds=training.steps * seconds, device_hours=hours, cost=cost
    )


def _cannot_split(devices: int, batch: int, passes: int) -> str:
    share = devices * passes
    parts = f"{devices} devices" + (f" x {passes} accumulation steps" if passes > 1 else "")
    if batch < share:
        return f"{parts}: less than one image of a batch of {batch} for each; training.batch_size {share} gives one"
    below = batch // share * share
    return f"{parts}: training.batch_size {batch} cannot be split over them; {below} and {below + share} can"


def _does_not_fit(
    recipe: Recipe, step: PaperStep, device: str, devices: int, images: int, state: int, peak: int
) -> str:
    """What is too much for the device, and which settings would make it fit."""
    training, usable = recipe.training, USABLE * DEVICES[device].memory
    needs = f"{devices} devices: {gb(state + peak)} do not fit {gb(usable)}, the usable part of one {device}"
    if state > usable:
        shared = " on every device; training.shard true divides it" if devices > 1 and not step.sharded else ""
        return f"{needs}; the model, its average and AdamW alone take {gb(state)}{shared}, however few the images"
    remedies = []
    for checkpointing in (False, True):
        for fewer in (n for n in range(images, 0, -1) if images % n == 0):
            passes = training.gradient_accumulation * images // fewer
            needed = state + step.peak_bytes(fewer, checkpointing, passes > 1)
            if needed <= usable and (checkpointing or not training.gradient_checkpointing):
                settings = ["training.gradient_checkpointing true"] if checkpointing else []
                settings += [f"training.gradient_accumulation {passes}"] if fewer < images else []
                remedies.append(f"{' with '.join(settings)} ({fewer} at once, {gb(needed)})")
                break
    return f"{needs}; " + (f"what would: {', or '.join(remedies)}" if remedies else "nor does one image at once")


def gb(value: float) -> str:
    return f"{value / 1e9:.1f} GB"
