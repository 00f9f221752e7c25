"""Intra-patch attention (Sec. 3.4): a small transformer over the pixels of a patch.

M = B * N patches, C channels, P patch side, D hidden size, w width.
"""

from torch import Tensor, nn

from ...errors import UserError
from ..backbone import TimeContext
from ..layers import Block, RMSNorm, rope_2d, start_small, xavier
from .pixels import POSITION_FEATURES, from_pixels, to_pixels

DEFAULT_WIDTH = 64
DEFAULT_DEPTH = 4
PIXEL_HEAD_DIM = 16
MLP_RATIO = 4.0


class AttentionHead(nn.Module):
    """`depth` transformer blocks, `width` wide, over the P*P pixels of a patch; the context modulates each block.

    Pixels know their place from PixNerd's position features and rotary positions.

    Raises:
        UserError: unless the width is a multiple of 16, the size of an attention head.
    """

    context_type = TimeContext

    def __init__(
        self, in_channels: int, patch_size: int, hidden_size: int, width: int | None = None, depth: int | None = None
    ):
        super().__init__()
        width = DEFAULT_WIDTH if width is None else width
        if width % PIXEL_HEAD_DIM:
            raise UserError(f"head_width={width}: the attention head needs a multiple of {PIXEL_HEAD_DIM}")
        self.embed = nn.Linear(in_channels + POSITION_FEATURES, width)
        self.blocks = nn.ModuleList(
            Block(width, width // PIXEL_HEAD_DIM, MLP_RATIO, condition_size=hidden_size)
            for _ in range(DEFAULT_DEPTH if depth is None else depth)
        )
        self.norm = RMSNorm(width)
        self.out = nn.Linear(width, in_channels)
        xavier(self)
        start_small(self.out)

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """patch (M, C, P, P) of x_t, context (M, D) -> velocity (M, C, P, P)."""
        p = patch.shape[-1]
        h = self.embed(to_pixels(patch))
        rope = rope_2d(p, p, PIXEL_HEAD_DIM, device=patch.device)
        for block in self.blocks:
            h = block(h, context, rope)
        return from_pixels(self.out(self.norm(h)), patch.shape)
