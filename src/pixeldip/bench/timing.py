"""Times that can be believed: contenders take turns on a warm machine, with clocks that wait for the device."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..processes import Processes
from ..terminal import Advance

Step = Callable[[], object]
WARM_UP = 2
LEAST_SECONDS = 0.05
"""Of a turn on a CUDA device: shorter steps are repeated in it, as they are in use, where nobody waits between them."""


@dataclass(frozen=True)
class Times:
    """Seconds of one step: the median over rounds, and half of the interquartile range."""

    median: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median, (high - low) / 2)


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    device: torch.device,
    processes: Processes | None = None,
    advance: Advance = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each step in each round; in a round every step runs once, so that all meet the same machine.

    Each step runs twice before the first round, which compiles it and warms it up.

    Args:
        processes: that take the steps together, and equally often, or they would wait for each other for ever.
        advance: called with 1 for each of the `turns` taken.
    """
    repeats = {}
    for name, step in steps.items():
        for _ in range(WARM_UP):
            step()
            advance(1)
        wanted = math.ceil(LEAST_SECONDS / seconds_of(step, 1, device)) if device.type == "cuda" else 1
        repeats[name] = max(processes.all_gather(wanted)) if processes else wanted
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, repeats[name], device))
            advance(1)
    return seconds


def turns(steps: Collection, rounds: int) -> int:
    """How many of them `take_turns` takes."""
    return len(steps) * (WARM_UP + rounds)


def seconds_of(step: Step, repeats: int, device: torch.device) -> float:
    """Of a step, the mean of so many."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronise(device)
    return (time.perf_counter() - began) / repeats


def ratio(seconds: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """How many times faster one step is than another: the median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def count_flops(step: Step) -> int:
    """FLOPs of a step's matrix products and convolutions; attention is counted as the products it consists of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


CEILING_SIZES = {"cuda": (8192, 2**28), "cpu": (3072, 2**26)}
"""Side of the matrices, and bytes of the copy."""


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: FLOP/s of a large matrix product, bytes/s read and written by a large copy."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, precision: torch.dtype) -> "Ceilings":
        n, length = CEILING_SIZES["cuda" if device.type == "cuda" else "cpu"]
        if precision == torch.int8:
            a, b = (torch.randint(-128, 128, (n, n), device=device, dtype=precision) for _ in range(2))
            product = functools.partial(torch._int_mm, a, b.t())
        else:
            a, b = (torch.randn(n, n, device=device, dtype=precision) for _ in range(2))
            product = functools.partial(torch.mm, a, b)
        source = torch.zeros(length, device=device, dtype=torch.uint8)
        target = torch.empty_like(source)
        seconds = take_turns({"product": product, "copy": lambda: target.copy_(source)}, 7, device)
        return cls(2 * n**3 / min(seconds["product"]), 2 * length / min(seconds["copy"]))
