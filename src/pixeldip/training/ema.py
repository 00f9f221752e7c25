"""The exponential moving average that samples are drawn from."""

import copy

import torch
from torch import nn


class EMA:
    """An averaged copy of a model: parameters and floating-point buffers, updated in place.

    The decay rises as min(decay, (1 + step) / (10 + step)), so that a short run is not an
    average over its own initialisation.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves towards `model` after its `step`-th update (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        average, current = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in average.items() if value.is_floating_point()]
        moved = [average[name] for name in floating]
        torch._foreach_lerp_(moved, [current[name] for name in floating], weight)
        torch.autograd.graph.increment_version(moved)  # which fused kernels leave, and the head's kept kernels go by
        for name in average.keys() - set(floating):
            average[name].copy_(current[name])
