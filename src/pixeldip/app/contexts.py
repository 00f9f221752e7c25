"""The velocity with and without the context that the backbone gives the head.

B batch, C channels, P patch side.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flow import SOLVERS, guided_velocity, seeded_normal, start_state, time_grid
from ..model import DiP
from ..pipeline import DiPPipeline

STEPS = 24


@dataclass(frozen=True)
class HeadStep:
    """One step of a path; states and velocities (B, C, H, W) on the CPU."""

    t: float
    x: Tensor
    velocity: Tensor
    without_context: Tensor

    def coarse_shares(self, patch_size: int) -> list[float]:
        """Of the velocity, of that without the context, and of their difference."""
        both = self.velocity, self.without_context, self.velocity - self.without_context
        return [coarse_share(v, patch_size) for v in both]


def coarse_share(v: Tensor, patch_size: int) -> float:
    """The share of the power of v (B, C, H, W) in waves longer than a patch, in [0, 1]; the mean is left out.

    By Parseval's theorem the other waves have the rest.
    """
    power = torch.fft.fft2(v.float()).abs().square().sum((0, 1))
    coarse, every = _coarse_waves(*v.shape[-2:], patch_size)
    return (power[coarse].sum() / power[every].sum().clamp(min=1e-30)).item()


def noise_share(height: int, width: int, patch_size: int) -> float:
    """The expected `coarse_share` of white noise: that of the frequencies."""
    coarse, every = _coarse_waves(height, width, patch_size)
    return (coarse.sum() / every.sum()).item()


def _coarse_waves(height: int, width: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Which frequencies (H, W) are of waves longer than a patch, and which of waves at all."""
    fy, fx = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    cycles_per_pixel = (fy[:, None].square() + fx.square()).sqrt()
    every = cycles_per_pixel > 0
    return every & (cycles_per_pixel < 1 / patch_size), every


def contexts(model: DiP) -> list[nn.Module]:
    """The layers that hand the backbone's context to a head, wherever heads stand; DiT-only has one too."""
    inner = [] if model.injection is None else [model.injection.context]
    return inner if model.config.placement == "intermediate" else [*inner, model.context]


@contextlib.contextmanager
def no_context(model: DiP) -> Iterator[None]:
    """Within it, heads see their noisy patches, and zeros in place of the context."""
    hooks = [layer.register_forward_hook(lambda _, __, context: torch.zeros_like(context)) for layer in contexts(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def compare_contexts(
    pipeline: DiPPipeline, label: str | None, seeds: list[int], tell: Callable[[HeadStep], None]
) -> None:
    """Samples with Euler's method, without guidance, and tells at each step both velocities at the state it is in."""
    model, device = pipeline.model, pipeline.device
    null_class = model.config.num_classes
    y = torch.full((len(seeds),), null_class if label is None else pipeline.class_id(label), device=device)
    velocity = guided_velocity(model, y, null_class)

    def both(x: Tensor, t: float, step_start: float) -> Tensor:
        v = velocity(x, t, step_start)
        with no_context(model):
            w = velocity(x, t, step_start)
        tell(HeadStep(t, x.float().cpu(), v.float().cpu(), w.float().cpu()))
        return v

    times = time_grid(STEPS, objective=model.objective)
    shape = (model.config.in_channels, pipeline.config.height, pipeline.config.width)
    SOLVERS["euler"](both, start_state(seeded_normal(seeds, shape, device), times), times)
