"""The coordinate-based MLP (Sec. 3.4): PixNerd's head (Wang et al. 2025), which its checkpoints hold.

M = B * N patches, C channels, P patch side, D hidden size, w width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import TimeContext
from ..layers import RMSNorm, start_small, xavier
from .pixels import POSITION_FEATURES, from_pixels, to_pixels

DEFAULT_WIDTH = 64
DEFAULT_DEPTH = 4
MLP_RATIO = 2


class CoordinateMLPHead(nn.Module):
    """Every pixel with its position goes through `depth` MLPs, `width` wide, whose weights the context generates."""

    context_type = TimeContext

    def __init__(
        self, in_channels: int, patch_size: int, hidden_size: int, width: int | None = None, depth: int | None = None
    ):
        super().__init__()
        width = DEFAULT_WIDTH if width is None else width
        self.embed = nn.Linear(in_channels + POSITION_FEATURES, width)
        self.blocks = nn.ModuleList(
            GeneratedMLP(hidden_size, width) for _ in range(DEFAULT_DEPTH if depth is None else depth)
        )
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, in_channels)
        xavier(self.embed)
        start_small(self.out)

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """patch (M, C, P, P) of x_t, context (M, D) -> velocity (M, C, P, P)."""
        h = self.embed(to_pixels(patch))
        for block in self.blocks:
            h = block(h, context)
        return from_pixels(self.out(self.norm(h)), patch.shape)


class GeneratedMLP(nn.Module):
    """h + silu(norm(h) A) B, where A and B are linear in the context and normalised over their first axis."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.width = width
        self.generator = nn.Linear(hidden_size, 2 * MLP_RATIO * width**2)
        self.norm = RMSNorm(width)
        nn.init.xavier_uniform_(self.generator.weight)
        nn.init.normal_(self.generator.bias, std=width**-0.5)  # the context alone could start near zero

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """h (M, P*P, w), context (M, D) -> (M, P*P, w)."""
        inner = MLP_RATIO * self.width
        a, b = self.generator(context).chunk(2, dim=-1)
        a = F.normalize(a.unflatten(-1, (self.width, inner)), dim=-2)
        b = F.normalize(b.unflatten(-1, (inner, self.width)), dim=-2)
        return h + F.silu(self.norm(h) @ a) @ b
