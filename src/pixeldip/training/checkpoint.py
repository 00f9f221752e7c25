"""Checkpoints that are either complete or not there."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from ..errors import UserError
from ..model import DiP
from ..pipeline import DiPPipeline
from ..run_folder import CHECKPOINTS, LORA, NETWORK, PIPELINE, TRAINING_STATE, checkpoints, step_name
from .ema import EMA


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
    """
    folder = run / CHECKPOINTS / step_name(step)
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    sampled = ema.model
    if getattr(ema.model, "peft_config", None):
        state["ema"] = ema.model.state_dict()
        DiPPipeline(ema.model, **pipeline).save_lora_weights(partial / LORA)
        sampled = merged(ema.model)
    DiPPipeline(sampled, **pipeline).save_pretrained(partial / PIPELINE, model_card=False)
    if projector is not None:
        state["projector"] = projector.state_dict()
    torch.save(state, partial / TRAINING_STATE)
    for path in partial.rglob("*"):
        if path.is_file():
            _flush(path)
    if folder.exists():  # the same step again, after a resume with other settings
        shutil.rmtree(folder)
    os.replace(partial, folder)
    _flush(folder.parent)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


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
        step = int(state["step"])
    except Exception as error:  # the readers raise many kinds for damaged files
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: cannot resume from this checkpoint ({reason}); delete it to use an earlier one"
        ) from error
    return step


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
