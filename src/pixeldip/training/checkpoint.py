"""Checkpoints that are either complete or not there."""

import contextlib
import copy
import errno
import functools
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils import get_total_norm

from ..errors import UserError
from ..model import DiP
from ..pipeline import DiPPipeline
from ..processes import Processes
from ..run_folder import CHECKPOINTS, LORA, NETWORK, PIPELINE, TRAINING_STATE, checkpoints, step_name
from .checksums import damage, write_checksums
from .ema import EMA
from .failures import again
from .sharding import is_sharded, whole_tensor
from .state import first_failure, read_state, training_state, write_state

_PARTIAL = "partial-"
_FULL = 2**20  # bytes free on a disk that is as good as full
_ONE_FILE = "1000TB"  # no averaged model is so large that it would be cut
_LAST_SECONDS = 60  # for a checkpoint that is being written when the run fails


class Checkpoints:
    """Saves the checkpoints of a run. All processes call its methods.

    A checkpoint is written under another name, flushed to disk and renamed, so that a run killed here keeps its
    earlier checkpoints and never sees half of this one. Parts of a sharded run are copied at once and written while
    the training goes on.

    Args:
        network: what is trained; its optimizer's state is saved with it.
        pipeline: what `DiPPipeline` is given beside the averaged model.
        keep: how many checkpoints are kept; older ones are deleted when a newer one is complete.
    """

    def __init__(
        self,
        run: Path,
        network: nn.Module,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        pipeline: dict[str, Any],
        keep: int,
        processes: Processes,
    ):
        self.run, self.network, self.ema, self.optimizer = run, network, ema, optimizer
        self.pipeline, self.keep, self.processes = pipeline, keep, processes
        self._pending: Future | None = None
        if is_sharded(network):
            self._group = dist.new_group(backend="gloo")  # the training's own must not be used by two threads
            self._completing = ThreadPoolExecutor(1)

    def save(self, step: int, averaged: DiP) -> None:
        """Saves after a step, with the whole averaged model.

        Raises:
            UserError: if the disk does not take it, or the weights are not finite; earlier checkpoints are left alone.
        """
        self.wait()
        self._check_finite(step)
        folder = self.run / CHECKPOINTS / step_name(step)
        partial = folder.with_name(f"{_PARTIAL}{folder.name}")
        if not is_sharded(self.network):
            whole = functools.partial(self._write_whole, partial, folder, step, averaged)
            self.processes.on_main(lambda: self._guarded(folder, whole))
            return
        self.processes.on_main(lambda: self._guarded(folder, lambda: self._write_pipeline(partial, averaged)))
        writer = HuggingFaceStorageWriter(str(partial / TRAINING_STATE), save_distributed=True)
        state = training_state(self.network, self.optimizer, step)
        written = dcp.async_save(state, storage_writer=writer, process_group=self._group)
        self._pending = self._completing.submit(self._complete_sharded, written, partial, folder)

    def wait(self) -> None:
        """Until what is being written is complete.

        Raises:
            UserError: in all processes, if it could not be.
        """
        if pending := self._pending:
            self._pending = None
            self.processes.together(pending.result)

    def abandon(self) -> None:
        """After an error, in this process alone: lets what is being written become complete, if it can."""
        if self._pending:
            with contextlib.suppress(Exception):
                self._pending.result(timeout=_LAST_SECONDS)

    def _check_finite(self, step: int) -> None:
        for weights in (self.network, self.ema.model):
            floating = [value for value in weights.state_dict().values() if value.is_floating_point()]
            if not whole_tensor(get_total_norm(floating)).isfinite():
                raise UserError(
                    f"step {step}: the weights are no longer finite, and were not saved; start again in another folder "
                    "with a lower optimizer.lr or training.precision fp32"
                )

    def _write_whole(self, partial: Path, folder: Path, step: int, averaged: DiP) -> None:
        adapters = averaged.adapters
        self._write_pipeline(partial, merged(averaged) if adapters else averaged)
        if adapters:
            DiPPipeline(averaged, **self.pipeline).save_lora_weights(partial / LORA)
        average = averaged if adapters else None
        write_state(partial / TRAINING_STATE, training_state(self.network, self.optimizer, step, average))
        self._complete(partial, folder)

    def _write_pipeline(self, partial: Path, averaged: DiP) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pipeline = DiPPipeline(averaged, **self.pipeline)
        pipeline.save_pretrained(partial / PIPELINE, model_card=False, max_shard_size=_ONE_FILE)

    def _complete_sharded(self, written: Future, partial: Path, folder: Path) -> None:
        def complete() -> None:
            try:
                written.result()
            except CheckpointException as error:
                raise first_failure(error) from error
            if self.processes.is_main:  # the first process is told last that all parts are written
                self._complete(partial, folder)

        self._guarded(folder, complete)

    def _complete(self, partial: Path, folder: Path) -> None:
        write_checksums(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                _flush(path)
        os.replace(partial, folder)
        _flush(folder.parent)
        for old in checkpoints(self.run)[: -self.keep]:
            old.rename(old.with_name(f"{_PARTIAL}{old.name}"))  # killed in between, half of it must not look whole
        for leftover in folder.parent.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # what someone still reads is tried again after the next one

    def _guarded(self, folder: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, SafetensorError) as error:
            reason = _reason(error, self.run)
            shutil.rmtree(folder.with_name(f"{_PARTIAL}{folder.name}"), ignore_errors=True)
            intact = "earlier checkpoints are intact. Put" if checkpoints(self.run) else "put"
            raise UserError(
                f"{folder}: could not be written ({reason}); {intact} it right, and the same command {again(self.run)}"
            ) from error


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
            f"{run}: no checkpoint to go on from ({'; '.join(damaged.values())}); start again in another folder, or "
            f"delete {run / CHECKPOINTS}"
        )
    return None, []


def load_checkpoint(folder: Path, network: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Restores everything, strictly, and returns the step it was saved after.

    Raises:
        UserError: if the files belong to another model.
    """
    try:
        adapters = ema.model.adapters
        step = read_state(folder / TRAINING_STATE, network, optimizer, ema.model if adapters else None)
        if not adapters:
            average = load_file(folder / PIPELINE / NETWORK / SAFETENSORS_WEIGHTS_NAME)
            set_model_state_dict(ema.model, average, options=StateDictOptions(full_state_dict=is_sharded(ema.model)))
    except Exception as error:  # the readers raise many kinds
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder}: cannot resume from this checkpoint ({reason}). Its files are as they were written: give the "
            "settings that the run began with, or choose another folder with --out"
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
