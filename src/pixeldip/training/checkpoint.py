"""Checkpoints that are either complete or not there."""

import copy
import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import get_total_norm

from ..errors import UserError
from ..model import DiP
from ..pipeline import DiPPipeline
from ..run_folder import CHECKPOINTS, LORA, NETWORK, PIPELINE, TRAINING_STATE, checkpoints, step_name
from .checksums import damage, write_checksums
from .ema import EMA
from .failures import RESUME

_PARTIAL = "partial-"
_WRITER = "inline_container"  # in the errors of torch's writer, which do not say why
_FULL = 2**20  # bytes free on a disk that is as good as full


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    pipeline: dict[str, Any],
    keep: int,
    projector: nn.Module | None = None,
) -> Path:
    """Writes the checkpoint of a step, then deletes all but the newest `keep`.

    It is written under another name, flushed to disk and renamed, so that a run killed here keeps
    its earlier checkpoints and never sees half of this one.

    Raises:
        UserError: if the disk does not take it, or the weights are not finite; the earlier checkpoints are left alone.
    """
    for weights in (model, ema.model):
        floating = [value for value in weights.state_dict().values() if value.is_floating_point()]
        if not get_total_norm(floating, math.inf).isfinite():
            raise UserError(
                f"step {step}: the weights are no longer finite, and were not saved; start anew in another folder with "
                "a lower optimizer.lr or training.precision fp32"
            )
    folder = run / CHECKPOINTS / step_name(step)
    partial = folder.with_name(f"{_PARTIAL}{folder.name}")
    try:
        _write(partial, step, model, ema, optimizer, pipeline, projector)
        if folder.exists():  # the same step again, after a resume with other settings
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _flush(folder.parent)
        for old in checkpoints(run)[:-keep]:
            old.rename(old.with_name(f"{_PARTIAL}{old.name}"))  # killed in between, half of it must not look whole
        for leftover in folder.parent.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _WRITER not in str(error):
            raise
        reason = _reason(error, run)
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder}: could not be written ({reason}); earlier checkpoints are intact. Put it right, and {RESUME}"
        ) from error
    return folder


def _write(
    folder: Path,
    step: int,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    pipeline: dict[str, Any],
    projector: nn.Module | None,
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    sampled = ema.model
    if getattr(ema.model, "peft_config", None):
        state["ema"] = ema.model.state_dict()
        DiPPipeline(ema.model, **pipeline).save_lora_weights(folder / LORA)
        sampled = merged(ema.model)
    DiPPipeline(sampled, **pipeline).save_pretrained(folder / PIPELINE, model_card=False)
    if projector is not None:
        state["projector"] = projector.state_dict()
    torch.save(state, folder / TRAINING_STATE)
    write_checksums(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)


def _reason(error: Exception, run: Path) -> str:
    if shutil.disk_usage(run).free < _FULL:
        return os.strerror(errno.ENOSPC)
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def sound_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with those newer than it.

    Damaged ones are kept under another name, `damaged-step-…`.

    Raises:
        UserError: if there are checkpoints, but none is sound.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(checkpoints(run)):
        if wrong := damage(folder):
            damaged[folder] = f"{folder.name} is damaged: {wrong}"
            continue
        for other in damaged:
            aside = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
        return folder, list(damaged.values())
    if damaged:
        raise UserError(
            f"{run}: no checkpoint to go on from ({'; '.join(damaged.values())}); start anew in another folder, or "
            f"delete {run / CHECKPOINTS}"
        )
    return None, []


def load_checkpoint(
    folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, projector: nn.Module | None = None
) -> int:
    """Restores everything, strictly, and returns the step it was saved after.

    Raises:
        UserError: if the files are damaged or belong to another model.
    """
    try:
        state = torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"], strict=True)
        if projector is not None:
            projector.load_state_dict(state["projector"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        average = state.get("ema") or load_file(folder / PIPELINE / NETWORK / SAFETENSORS_WEIGHTS_NAME)
        ema.model.load_state_dict(average, strict=True)
    except Exception as error:  # the readers raise many kinds for damaged files
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: cannot resume from this checkpoint ({reason}); delete it to use an earlier one"
        ) from error
    return state["step"]


def merged(model: DiP) -> DiP:
    """A copy of a model with its adapters added into the layers they stand on."""
    copied = copy.deepcopy(model)
    copied.fuse_lora()
    copied.unload_lora()
    return copied


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
