"""Solvers of dx/dt = v(x, t) from noise to data, for any velocity.

A velocity is called as `velocity(x, t, step_start)`: floats t, the time it is asked for, and
step_start, the start of the step being taken, for whoever must act the same over a whole step
(guidance does). The state x keeps its dtype.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .path import shift_times

Velocity = Callable[[Tensor, float, float], Tensor]
OnStep = Callable[[int, float, Tensor, Tensor], None]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 times from 0 to 1, evenly spaced before the shift.

    Raises:
        UserError: unless steps >= 1 and shift > 0.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: at least one step is needed")
    if not shift > 0:
        raise UserError(f"time shift {shift}: must be above 0 (1 leaves the times as they are)")
    return shift_times(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()


def euler(velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """First order, one evaluation a step."""
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        x = x + (t1 - t0) * v
        if on_step:
            on_step(i, t0, x, v)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Second order, two evaluations a step, except the last, which is Euler's (as in the release)."""
    last = len(times) - 2
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        if i < last:
            v = (v + velocity(x + (t1 - t0) * v, t1, t0)) / 2
        x = x + (t1 - t0) * v
        if on_step:
            on_step(i, t0, x, v)
    return x


def adams_bashforth2(velocity: Velocity, x: Tensor, times: Sequence[float], on_step: OnStep | None = None) -> Tensor:
    """Second order, one evaluation a step: the last two velocities, extrapolated; uneven steps allowed."""
    previous = None
    for i, (t0, t1) in enumerate(zip(times, times[1:])):
        v = velocity(x, t0, t0)
        slope = 0 if previous is None else (v - previous) / (t0 - times[i - 1])
        x = x + (t1 - t0) * (v + (t1 - t0) / 2 * slope)
        previous = v
        if on_step:
            on_step(i, t0, x, v)
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun, "ab2": adams_bashforth2}


def evaluations(solver: str, steps: int) -> int:
    """Velocity evaluations of a whole solution (the paper's NFE counts guided ones as two each)."""
    return 2 * steps - 1 if solver == "heun" else steps
