"""Solvers of dx/dt = v(x, t) from noise to data, for any velocity.

A velocity is called as `velocity(x, t, step_start)`: floats t, the time it is asked for, and
step_start, the start of the step being taken, for whoever must act the same over a whole step
(guidance does). The state x keeps its dtype. After each step `on_step` is called with the step's number and with
the time and state it reached; a tensor it returns takes the state's place.
"""

import bisect
import inspect
import math
import numbers
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .objectives import VelocityObjective
from .path import shift_times

Velocity = Callable[[Tensor, float, float], Tensor]
OnStep = Callable[[int, float, Tensor], Tensor | None]
FreshNoise = Callable[[int], Tensor]


def time_grid(steps: int, shift: float = 1.0, objective: VelocityObjective | None = None) -> list[float]:
    """The steps + 1 times from noise to 1, evenly spaced in schedule time before the shift.

    They begin at 0 unless the path of the objective begins later. Unshifted, they are the numbers one types, such as
    0.3, so that a step that starts on a guidance interval's bound is outside of it.

    Raises:
        UserError: unless steps is a whole number of at least 1 and shift > 0, and so near 1 that all times differ.
    """
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise UserError(f"steps={steps!r}: at least one step is needed, and a whole number")
    if not shift > 0:
        raise UserError(f"time shift {shift}: must be above 0 (1 leaves the times as they are)")
    r = shift_times(torch.arange(steps + 1, dtype=torch.float64) / steps, shift)
    times = (objective or VelocityObjective()).flow_time(r).tolist()
    if not all(t0 < t1 for t0, t1 in zip(times, times[1:])):
        raise UserError(f"time shift {shift:g}: too far from 1, of {steps} steps some have no length")
    return times


def start_state(noise: Tensor, times: Sequence[float]) -> Tensor:
    """The state at times[0] of a path that begins in noise of unit variance; at 0 the noise itself."""
    return noise * math.hypot(times[0], 1 - times[0])


def reached(on_step: OnStep | None, step: int, t: float, x: Tensor) -> Tensor:
    """The state that goes on after `on_step`, if there is one, has seen it."""
    replaced = on_step(step, t, x) if on_step else None
    return x if replaced is None else replaced


def euler(velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """First order, one evaluation a step."""
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        x = x + (t1 - t0) * v
        x = reached(on_step, i, t1, x)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Second order, two evaluations a step, except the last, which is Euler's (as in the release). Where the objective
    makes the last step a long one, as `NoiseObjective` does, its error is most of the whole, and is of first order."""
    last = len(times) - 2
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        if i < last:
            v = (v + velocity(x + (t1 - t0) * v, t1, t0)) / 2
        x = x + (t1 - t0) * v
        x = reached(on_step, i, t1, x)
    return x


def adams_bashforth2(velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Second order, one evaluation a step: the last two velocities, extrapolated; uneven steps allowed."""
    previous = None
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        slope = 0 if previous is None else (v - previous) / (t0 - times[i - 1])
        x = x + (t1 - t0) * (v + (t1 - t0) / 2 * slope)
        previous = v
        x = reached(on_step, i, t1, x)
    return x


def ancestral(
    velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None, *, noise: FreshNoise
) -> Tensor:
    """DDPM's sampler (Ho et al. 2020, Algorithm 2): each step replaces a part of the noise by fresh noise.

    Of a step from t0 to t1, DDIM's eta = 1 (Song et al. 2021, Eq. 16) in terms of the noise-to-signal ratios
    q = (1 - t) / t: the share of fresh variance is 1 - (q1 / q0)^2.

    Args:
        noise: fresh noise like x for step i, of unit variance.
    """
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        image = x + (1 - t0) * v
        kept = (1 - t1) * t0 / (t1 * (1 - t0))  # q1 / q0
        x = t1 * image + (1 - t1) * (kept * (image - v) + math.sqrt(1 - kept**2) * noise(i))
        x = reached(on_step, i, t1, x)
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "ab2": adams_bashforth2,
    "ddim": euler,  # Song et al. 2021, eta = 0: on the straight path its step is Euler's
    "ancestral": ancestral,
}


def is_stochastic(solver: str) -> bool:
    """Whether a solver asks for fresh noise: it has an argument `noise`."""
    return "noise" in inspect.signature(SOLVERS[solver]).parameters


def evaluations(solver: str, steps: int) -> int:
    """Velocity evaluations of a whole solution (the paper's NFE counts guided ones as two each), counted by solving
    for a single number."""
    count = 0

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        nonlocal count
        count += 1
        return torch.zeros_like(x)

    fresh = {"noise": lambda step: torch.zeros(1)} if is_stochastic(solver) else {}
    SOLVERS[solver](velocity, torch.zeros(1), time_grid(steps), **fresh)
    return count


def steps_within(solver: str, budget: int) -> int:
    """The most steps that take no more velocity evaluations than the budget, at least 1."""
    steps = range(1, budget + 1)
    return max(1, bisect.bisect_right(steps, budget, key=lambda n: evaluations(solver, n)))
