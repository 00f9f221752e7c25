"""The memory of sampling and training: what a model holds, and what each image of a batch adds."""

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..model import DiP
from ..training.pretrained import network_config
from .heads import other_heads
from .latency import noise_and_labels, sampling_contender
from .timing import Step, synchronise
from .training import TrainingStep

STEPS = 2  # the first leaves behind what the second one meets: kernels, the state of the optimizer
DOINGS = ("sampling", "training", "training, checkpointing")


def bench_memory(
    model: DiP,
    size: tuple[int, int],
    batches: Sequence[int],
    device: torch.device,
    precision: torch.dtype,
    heads: bool,
) -> dict[str, Any]:
    """Peak memory of a few steps for each batch size, beyond what the process held before it built the model.

    On a GPU it is what torch's allocator gave out; on a CPU the resident memory, work space of libraries included.
    Modulation computed ahead and graphs are not in it.

    Args:
        heads: also with each other head, and with none.

    Returns:
        "steps": MiB by what was done and batch size; "per_image": MiB that one image more takes, between the smallest
        and the largest batch; "series": [batch, MiB] pairs of the model itself.

    Raises:
        UserError: where the peak cannot be read.
    """
    if device.type == "mps" or (device.type == "cpu" and sys.platform != "linux"):
        raise UserError(f"bench memory: the peak can be read on cuda, and on Linux for cpu, not here on {device.type}")
    config = network_config(model.config)
    for doing in DOINGS:  # libraries take what they keep before anything is measured
        _peak(config, size, min(batches), doing, device, precision)
    asked = {doing: (config, doing) for doing in DOINGS}
    if heads:
        asked |= {f"{doing}, {name}": (of, doing) for name, of in other_heads(model).items() for doing in DOINGS}
    peaks = {
        name: {batch: _peak(of, size, batch, doing, device, precision) for batch in batches}
        for name, (of, doing) in asked.items()
    }
    low, high = min(batches), max(batches)
    return {
        "steps": {f"{name}, {batch}": {"mebibytes": of[batch]} for name, of in peaks.items() for batch in batches},
        "per_image": {name: (of[high] - of[low]) / (high - low) for name, of in peaks.items()} if high > low else {},
        "series": {doing: [[batch, peaks[doing][batch]] for batch in batches] for doing in DOINGS},
    }


def _peak(
    config: Mapping[str, Any],
    size: tuple[int, int],
    batch: int,
    doing: str,
    device: torch.device,
    precision: torch.dtype,
) -> float:
    before = _start_anew(device)
    model = DiP(**config).to(device)
    x, y = noise_and_labels(model, size, batch, device)
    step: Step
    if doing == "sampling":
        step = sampling_contender(model.eval().requires_grad_(False).type(torch.bfloat16), x, y).step
    else:
        if doing.endswith("checkpointing"):
            model.enable_gradient_checkpointing()
        step = functools.partial(TrainingStep(model, precision), x, y)
    for _ in range(STEPS):
        step()
    synchronise(device)
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return (_resident("VmHWM") - before) / 2**20


def _start_anew(device: torch.device) -> int:
    """Sets the peak back to what is held now, in bytes, and returns that."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError):  # glibc alone keeps what is freed
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def _resident(entry: str) -> int:
    """Bytes of an entry in kB of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))
