"""The memory of sampling and training: what a model holds, and what each image of a batch adds."""

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..model import DiP, network_config
from .heads import other_heads
from .steps import TrainingStep, noise_and_labels, sampling_contender
from .timing import Step, synchronise

STEPS = 2  # the first leaves behind what the second one meets: kernels, the state of the optimizer
DOINGS = ("sampling", "training", "training, checkpointing")


@contextlib.contextmanager
def _all_else_settled() -> Iterator[None]:
    """In here what was there before is not looked through for garbage again and again, which takes half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_all_else_settled()
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
        and the largest batch that fit; "series": [batch, MiB] pairs of the model itself; "too_large": what did not fit.

    Raises:
        UserError: where the peak cannot be read, or not even the smallest batch fits.
    """
    if device.type == "mps" or (device.type == "cpu" and sys.platform != "linux"):
        raise UserError(f"bench memory: the peak can be read on cuda, and on Linux for cpu, not here on {device.type}")
    config = network_config(model.config)
    for doing in DOINGS:  # libraries take what they keep before anything is measured
        _peak_if_it_fits(config, size, min(batches), doing, device, precision)
    asked = {doing: (config, doing) for doing in DOINGS}
    if heads:
        asked |= {f"{doing}, {name}": (of, doing) for name, of in other_heads(model).items() for doing in DOINGS}
    peaks = {
        name: {batch: _peak_if_it_fits(of, size, batch, doing, device, precision) for batch in batches}
        for name, (of, doing) in asked.items()
    }
    fitting = {name: {batch: peak for batch, peak in of.items() if peak is not None} for name, of in peaks.items()}
    if not all(fitting[doing] for doing in DOINGS):
        raise UserError(f"{min(batches)}: the device's memory does not hold a step; give smaller --batches")
    return {
        "steps": {f"{name}, {batch}": {"mebibytes": of[batch]} for name, of in fitting.items() for batch in of},
        "per_image": {
            name: (of[max(of)] - of[min(of)]) / (max(of) - min(of)) for name, of in fitting.items() if len(of) > 1
        },
        "series": {doing: [[batch, peak] for batch, peak in fitting[doing].items()] for doing in DOINGS},
        "too_large": [f"{name}, {batch}" for name, of in peaks.items() for batch in of if batch not in fitting[name]],
    }


def _peak_if_it_fits(*arguments: Any) -> float | None:
    """As `_peak`, in MiB; None where the device's memory does not hold it."""
    try:
        return _peak(*arguments)
    except torch.OutOfMemoryError:
        return None


def _peak(
    config: Mapping[str, Any],
    size: tuple[int, int],
    batch: int,
    doing: str,
    device: torch.device,
    precision: torch.dtype,
) -> float:
    before = _start_anew(device)
    model = DiP(**config)
    if doing == "sampling":
        model = model.eval().requires_grad_(False).type(torch.bfloat16)
        _start_anew(device)  # building it took float32
    model.to(device)
    x, y = noise_and_labels(model, size, batch, device)
    step: Step
    if doing == "sampling":
        step = sampling_contender(model, x, y).step
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
