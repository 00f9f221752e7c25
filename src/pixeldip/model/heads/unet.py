"""The convolutional U-Net, the paper's Patch Detailer Head (Sec. 3.4, Fig. 6).

M = B * N patches, C channels, P patch side, D hidden size.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..backbone import TimeContext

DEFAULT_WIDTH = 64
MAX_DEFAULT_DEPTH = 4


class UNetHead(nn.Module):
    """`depth` stages down and up, `width` channels in the first; the context joins at the bottleneck.

    A side that is odd at some stage is rounded up when it is halved, and cut again on the way up.

    Raises:
        UserError: if the patch is down to one pixel before `depth` stages.
    """

    context_type = TimeContext

    def __init__(
        self, in_channels: int, patch_size: int, hidden_size: int, width: int | None = None, depth: int | None = None
    ):
        super().__init__()
        width = DEFAULT_WIDTH if width is None else width
        halvings = (patch_size - 1).bit_length()  # until one pixel is left
        depth = min(halvings, MAX_DEFAULT_DEPTH) if depth is None else depth
        if not 1 <= depth <= halvings:
            raise UserError(
                f"head_depth={depth}: the unet head halves the patch at every stage, and patch_size={patch_size} "
                f"can be halved {halvings} times; give a head_depth from 1 to {halvings}"
                if halvings
                else "patch_size=1: the unet head needs at least 2"
            )
        widths = [width * 2**i for i in range(depth)]
        merged = [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise([in_channels, *widths]))
        self.bottleneck = nn.Conv2d(widths[-1] + hidden_size, widths[-1], 1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, w, 2, stride=2) for w in widths)
        self.merge = nn.ModuleList(nn.Conv2d(2 * a, b, 3, padding=1) for a, b in zip(widths, merged, strict=True))
        self.out = nn.Conv2d(widths[0], in_channels, 1)
        self._initialise()
        self.to(memory_format=torch.channels_last)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_in = module.weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
                nn.init.normal_(module.weight, std=(2.0 / fan_in) ** 0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.out.weight, std=0.01 * self.out.weight[0].numel() ** -0.5)

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """patch (M, C, P, P) of x_t, context (M, D) -> velocity (M, C, P, P)."""
        h = patch.contiguous(memory_format=torch.channels_last)
        skips = []
        for down in self.down:
            h = F.silu(down(h))
            skips.append(h)
            h = F.max_pool2d(h, 2, ceil_mode=True)
        context = context[:, :, None, None].expand(-1, -1, *h.shape[-2:])
        h = F.silu(self.bottleneck(torch.cat([h, context], dim=1)))
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips), strict=True):
            height, width = skip.shape[-2:]
            h = F.silu(merge(torch.cat([up(h)[..., :height, :width], skip], dim=1)))
        return self.out(h)
