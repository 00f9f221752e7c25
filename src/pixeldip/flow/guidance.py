"""Classifier-free guidance inside an interval of time (Ho & Salimans 2022; Kynkäänniemi et al. 2024)."""

import torch
from torch import Tensor

from ..errors import UserError
from .path import VelocityNetwork
from .solvers import Velocity


def check_interval(interval: tuple[float, float]) -> None:
    """Raises UserError unless 0 <= lo <= hi <= 1."""
    lo, hi = interval
    if not 0 <= lo <= hi <= 1:
        raise UserError(f"guidance interval ({lo}, {hi}): give two times with 0 <= lo <= hi <= 1")


def guided_velocity(
    network: VelocityNetwork,
    y: Tensor,
    null_class: int,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """Velocity for classes y (B,): u + scale (c - u) in steps that start at lo < t < hi.

    Outside the interval, and for a scale of 1, the unconditional branch is not evaluated. Inside,
    the network is asked for both branches at once. lo = 0 includes the first step (the release's strict
    comparison would leave it out), so that (0, 1) means always.

    Args:
        network: called with a time for each image, or with one float for all if it has the attribute `takes_one_time`.

    Raises:
        UserError: unless 0 <= lo <= hi <= 1.
    """
    check_interval(interval)
    lo, hi = interval
    takes_one_time = getattr(network, "takes_one_time", False)
    both = torch.stack([y, torch.full_like(y, null_class)])

    def velocity(x: Tensor, t: float, step_start: float) -> Tensor:
        inside = (lo < step_start or lo == 0) and step_start < hi
        times = t if takes_one_time else x.new_full((len(x),), t)
        if scale == 1 or not inside:
            return network(x, times, y)
        c, u = network(x, times, both)
        return u + scale * (c - u)

    return velocity
