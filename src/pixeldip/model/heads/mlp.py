"""The standard MLP (Sec. 3.4): context and flattened patch in, flattened patch out; pixels are an unordered set to it.

M = B * N patches, C channels, P patch side, D hidden size.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..backbone import TimeContext
from ..layers import start_small

DEFAULT_DEPTH = 2


class MLPHead(nn.Module):
    """`depth` hidden layers, `width` wide (by default as wide as the backbone)."""

    context_type = TimeContext

    def __init__(
        self, in_channels: int, patch_size: int, hidden_size: int, width: int | None = None, depth: int | None = None
    ):
        super().__init__()
        patch_dim = in_channels * patch_size**2
        widths = [width or hidden_size] * (DEFAULT_DEPTH if depth is None else depth)
        layers: list[nn.Module] = []
        for a, b in pairwise([patch_dim + hidden_size, *widths]):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1], patch_dim)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.hidden:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=(2.0 / layer.in_features) ** 0.5)
                nn.init.zeros_(layer.bias)
        start_small(self.out)

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """patch (M, C, P, P) of x_t, context (M, D) -> velocity (M, C, P, P)."""
        return self.out(self.hidden(torch.cat([patch.flatten(1), context], dim=-1))).view(patch.shape)
