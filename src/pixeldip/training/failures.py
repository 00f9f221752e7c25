"""What ends a run from outside, each in one sentence; faults of ours keep their stack traces."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch

from ..errors import UserError, is_out_of_memory
from ..processes import Processes
from ..recipe import Recipe, TrainingSection
from ..run_folder import newest_checkpoint

_STORAGE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "EACCES", "EPERM", "ESTALE", "ENOTCONN")
    if hasattr(errno, name)
}
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def again(run: Path) -> str:
    """What the same command does after a run has failed."""
    try:
        is_saved = newest_checkpoint(run) is not None
    except OSError:  # of the storage that the run has failed of
        is_saved = True
    return "goes on from the last checkpoint" if is_saved else "starts from the beginning, for want of a checkpoint"


@contextlib.contextmanager
def explaining_failures(recipe: Recipe, processes: Processes) -> Iterator[None]:
    """Raises a UserError in place of what memory, storage, a data worker or another process does to a run."""
    try:
        yield
    except (UserError, BrokenPipeError):  # the latter of our own output
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if message := _explanation(error, recipe, processes):
            raise UserError(message) from error
        raise


def _explanation(error: Exception, recipe: Recipe, processes: Processes) -> str | None:
    text, does = str(error), again(Path(recipe.out))
    if is_out_of_memory(error):
        return f"{_memory(recipe.training, processes)}: the run {does}"
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return f"{error.filename or recipe.out}: {error.strerror}; put it right, and the same command {does}"
    if "DataLoader" in text and "timed out" in text:
        return (
            f"no batch came within data.timeout = {recipe.data.timeout} s: is {recipe.data.source} still reachable? "
            f"The same command {does}; raise data.timeout, or data.workers, for slow storage"
        )
    if "DataLoader worker (pid" in text:
        return (
            f"a process that reads images died ({text.splitlines()[0].rstrip('. ')}); killed for memory, perhaps: "
            f"lower data.workers. The same command {does}"
        )
    if processes.world_size > 1 and any(sign in text for sign in _PEER_GONE):
        return (
            f"process {processes.rank} of {processes.world_size}: another process of this run has ended, and its own "
            f"message says why; the same command {does} (torchrun --max-restarts N does so by itself)"
        )
    return None


def _memory(training: TrainingSection, processes: Processes) -> str:
    batch = training.batch_size // (processes.world_size * training.gradient_accumulation)
    settings = []
    if batch > 1:
        share = next(n for n in range(2, batch + 1) if batch % n == 0)
        settings.append(f"--training.gradient-accumulation {training.gradient_accumulation * share}")
    if not training.gradient_checkpointing:
        settings.append("--training.gradient-checkpointing")
    if training.precision == "fp32":
        settings.append("--training.precision bf16 (in a new folder: it changes what is computed)")
    held = ""
    if processes.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(processes.device)
        held = f" of {total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    advice = f"give {' or '.join(settings)}, or a smaller model" if settings else "give a smaller model"
    return (
        f"out of memory on {processes.device}{held} with {batch} images at once in each of {processes.world_size} "
        f"processes; {advice}"
    )
