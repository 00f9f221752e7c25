"""The flow-matching path (Eq. 5), as pure functions of given random numbers.

Time runs from 0 (noise) to 1 (data): x_t = t x + (1 - t) eps, and the velocity is x - eps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

VelocityNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(x, t, y): x (B, C, H, W), t (B,) and labels y (B,) -> (B, C, H, W); y (G, B), G labels each -> (G, B, C, H, W)."""


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (B,) as (B, 1, 1, 1) in the dtype of x (B, C, H, W)."""
    return t.view(-1, 1, 1, 1).to(x.dtype)


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for x, noise (B, C, H, W) and t (B,)."""
    t = like(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The target of the network, constant along the path: x - eps."""
    return x - noise


def clean_image(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The image a velocity (B, C, H, W) points to from x_t at t (B,): x_t + (1 - t) v."""
    return x_t + (1 - t.view(-1, 1, 1, 1)) * v


def logit_normal_times(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid(N(mean, std)) from u uniform in (0, 1); the release trains with mean 0, std 1."""
    wide = u if u.device.type == "mps" else u.double()  # Apple's GPUs have no float64
    z = math.sqrt(2.0) * torch.erfinv((2 * wide - 1).clamp(-1 + 1e-12, 1 - 1e-12))
    return torch.sigmoid(mean + std * z).to(u.dtype)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t / (t + (1 - t) shift): a shift above 1 moves times towards the noise; 1 leaves them."""
    return t / (t + (1 - t) * shift)


def drop_classes(y: Tensor, u: Tensor, probability: float, null_class: int) -> Tensor:
    """Replaces labels (B,) by the null class where u, uniform in [0, 1), is below the probability."""
    return torch.where(u < probability, null_class, y)
