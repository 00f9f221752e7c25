"""The memory of sampling and training: what a model holds, and what each image of a batch adds."""

import contextlib
import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..model import DiP, network_config
from ..terminal import StartPass
from .heads import other_heads
from .steps import TrainingStep, noise_and_labels, sampling_contender
from .timing import Step, synchronise

STEPS = 2  # the second one meets the state of the optimizer that the first has left
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
    start: StartPass,
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
    asked = {doing: (config, doing) for doing in DOINGS}
    if heads:
        asked |= {f"{doing}, {name}": (of, doing) for name, of in other_heads(model).items() for doing in DOINGS}

    advance = start("Measuring", len(asked) * len(batches))

    def peak(of: Mapping[str, Any], batch: int, doing: str) -> float | None:
        found = _peak_if_it_fits(functools.partial(_take_steps, of, size, batch, doing, device, precision), device)
        advance(1)
        return found

    peaks = {name: {batch: peak(of, batch, doing) for batch in batches} for name, (of, doing) in asked.items()}
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


def _peak_if_it_fits(take_steps: Callable[[int], None], device: torch.device) -> float | None:
    """In MiB; None where the device's memory does not hold the steps."""
    try:
        take_steps(1)  # what libraries keep for every shape they have met is there before anything is measured
        before = _held_now(device)
        take_steps(STEPS)
    except torch.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return (peak - before) / 2**20


def _take_steps(
    config: Mapping[str, Any],
    size: tuple[int, int],
    batch: int,
    doing: str,
    device: torch.device,
    precision: torch.dtype,
    steps: int,
) -> None:
    """Builds the model first."""
    model = DiP(**config)
    if doing == "sampling":
        model = model.eval().requires_grad_(False).type(precision)
        _held_now(device)  # building it took float32
    model.to(device)
    x, y = noise_and_labels(model, size, batch, device)
    step: Step
    if doing == "sampling":
        step = sampling_contender(model, x, y).step
    else:
        if doing.endswith("checkpointing"):
            model.enable_gradient_checkpointing()
        step = functools.partial(TrainingStep(model, precision), x, y)
    for _ in range(steps):
        step()
    synchronise(device)


def _held_now(device: torch.device) -> int:
    """Bytes held now, where the peak starts again."""
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
