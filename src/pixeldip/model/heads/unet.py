"""The convolutional U-Net, the paper's Patch Detailer Head (Sec. 3.4, Fig. 6).

M = B * N patches, C channels, P patch side, D hidden size.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..backbone import TimeContext

Composed = tuple[Tensor, Tensor, Tensor]

DEFAULT_WIDTH = 64
MAX_DEFAULT_DEPTH = 4


class UNetHead(nn.Module):
    """`depth` stages down and up, `width` channels in the first; the context joins at the bottleneck.

    A side that is odd at some stage is rounded up when it is halved, and cut again on the way up.

    Raises:
        UserError: if the patch is down to one pixel before `depth` stages.
    """

    context_type = TimeContext
    takes_several_contexts = True

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
        self.kept_kernels: dict[int, tuple[tuple, Composed]] = {}
        self._compiled: Callable[..., Tensor] | None = None
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
        """patch (M, C, P, P) of x_t, context (M, D) -> velocity (M, C, P, P).

        For G contexts of each patch, (G, M, D), it is (G, M, C, P, P), and the way down is computed once.
        """
        return (self._compiled or UNetHead._paint)(self, patch, context, self._kernels(patch.shape[-1]))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As elsewhere; the composition of kernels stays outside, where they can be kept."""
        self._compiled = torch.compile(UNetHead._paint, *args, **kwargs)

    def _kernels(self, side: int) -> list[Composed | None]:
        """Of each stage up, from the patch's side; None where its two convolutions cannot be composed."""
        kernels: list[Composed | None] = []
        for i in range(len(self.up)):
            half = (side + 1) // 2
            composes = side == 2 * half and _plain(self.up[i], self.merge[i])
            kernels.append(self._composed(i, half) if composes else None)
            side = half
        return kernels

    def _paint(self, patch: Tensor, context: Tensor, kernels: list[Composed | None]) -> Tensor:
        h = patch.contiguous(memory_format=torch.channels_last)
        skips = []
        for down in self.down:
            h = F.silu(down(h))
            skips.append(h)
            h = F.max_pool2d(h, 2, ceil_mode=True)
        g = len(context) if context.dim() == 3 else 1
        h = F.silu(self._join(h, context, g))
        for i in reversed(range(len(self.up))):
            h = self._stage_up(i, h, skips[i], g, kernels[i])
        return self.out(h).view(*context.shape[:-1], *patch.shape[1:])

    def _join(self, h: Tensor, context: Tensor, g: int) -> Tensor:
        """The bottleneck of h (M, w, side, side) and contexts (M, D) or (G, M, D) -> (G M, w, side, side)."""
        if not _plain(self.bottleneck):
            cells = context.flatten(0, -2)[..., None, None].expand(-1, -1, *h.shape[-2:])
            return self.bottleneck(torch.cat([h.repeat(g, 1, 1, 1), cells], dim=1))
        weight, pixels = self.bottleneck.weight, h.shape[1]
        contexts = F.linear(context, weight[:, pixels:].flatten(1), self.bottleneck.bias)
        return (F.conv2d(h, weight[:, :pixels]) + contexts[..., None, None]).flatten(0, -4)

    def _stage_up(self, i: int, h: Tensor, skip: Tensor, g: int, composed: Composed | None) -> Tensor:
        """h (G M, w, side, side) and skip (M, w, 2 side, 2 side) -> (G M, w', 2 side, 2 side)."""
        if composed is None:
            height, width = skip.shape[-2:]
            joined = torch.cat([self.up[i](h)[..., :height, :width], skip.repeat(g, 1, 1, 1)], dim=1)
            return F.silu(self.merge[i](joined))
        kernel, bias, skip_kernel = composed
        padding = 0 if kernel.shape[-1] == 2 else 1
        raised = F.conv_transpose2d(h, kernel, stride=2, padding=padding)
        seen = F.conv2d(skip, skip_kernel, padding=1) + bias
        if g == 1:
            return F.silu(raised + seen)
        return F.silu(raised.unflatten(0, (g, -1)) + seen).flatten(0, 1)

    def forget_kernels(self) -> None:
        """After weights may have changed without a trace: by a fused optimizer, or through their `.data`."""
        self.kept_kernels.clear()

    def train(self, mode: bool = True) -> "UNetHead":
        """As elsewhere; forgets kept kernels."""
        self.forget_kernels()
        return super().train(mode)

    def _composed(self, i: int, side: int) -> Composed:
        """Of stage i; in evaluation mode without gradients kept from call to call, until a weight changes or moves,
        as far as it leaves a trace."""
        up, merge = self.up[i], self.merge[i]
        weights = (up.weight, up.bias, merge.weight, merge.bias)
        kept = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not kept or any(weight.is_inference() for weight in weights):
            return compose(*weights, side)
        device = up.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else up.weight.dtype
        state = side, dtype, [(w.data_ptr(), w._version) for w in weights]
        if i not in self.kept_kernels or self.kept_kernels[i][0] != state:
            with torch.autocast(device, enabled=False):
                parts = compose(*(w.float() for w in weights), side)
            self.kept_kernels[i] = state, tuple(part.to(dtype, memory_format=torch.channels_last) for part in parts)
        return self.kept_kernels[i][1]


def _plain(*layers: nn.Module) -> bool:
    """Whether layers may be computed by their weights alone: adapters, hooks and offloading want to be called."""
    return all(
        type(layer) in (nn.Conv2d, nn.ConvTranspose2d)
        and "forward" not in layer.__dict__
        and not layer._forward_pre_hooks
        and not layer._forward_hooks
        for layer in layers
    )


def compose(up: Tensor, up_bias: Tensor, merge: Tensor, merge_bias: Tensor, side: int) -> Composed:
    """A 2 x 2 transposed convolution of stride 2 and the 3 x 3 convolution of its result and a skip, as one each.

    Nothing non-linear stands between the two, so their kernels compose to one of 4 x 4: 16 multiplications per cell
    and pair of channels in place of 4 and 36.

    Args:
        up: (in, w, 2, 2), its bias (w,).
        merge: (out, w + skip, 3, 3), its bias (out,).
        side: pixels of the smaller image, which is square.

    Returns:
        The kernel (in, out, 4, 4) for stride 2 and padding 1, of which a single pixel needs only the middle 2 x 2
        without padding; the bias (1, out, 2 side, 2 side), which knows of the zeros around the image; and the
        kernel of the skip (out, skip, 3, 3).
    """
    middle = up.shape[1]
    kernel = F.conv2d(up, merge[:, :middle], padding=2)
    if side == 1:
        kernel = kernel[..., 1:3, 1:3]
    flat = up_bias.view(1, -1, 1, 1).expand(1, middle, 2 * side, 2 * side)
    bias = F.conv2d(flat, merge[:, :middle], merge_bias, padding=1)
    return kernel, bias, merge[:, middle:]
