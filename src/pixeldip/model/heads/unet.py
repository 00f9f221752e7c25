"""The convolutional U-Net, the paper's Patch Detailer Head (Sec. 3.4, Fig. 6).

M = B * N patches, C channels, P patch side, D hidden size.
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from ..backbone import TimeContext
from ..layers import start_small, untouched

Kernels = tuple[Tensor, ...]
"""What convolutions are computed with in place of their weights: `compose` and `as_matrix` make them."""

DEFAULT_WIDTH = 64
MAX_DEFAULT_DEPTH = 4
ALIGNED = 8
"""Numbers whose multiples tensor cores take matrices of."""


class Stage(NamedTuple):
    """Of one stage down and up, the kernels; None where its layers themselves are called."""

    down: Kernels | None
    up: Kernels | None


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
        self.kept_kernels: dict[tuple, tuple[tuple, Kernels]] = {}
        self._compiled: Callable[..., Tensor] | None = None
        self._initialise()
        self.to(memory_format=torch.channels_last)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_in = module.weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
                nn.init.normal_(module.weight, std=(2.0 / fan_in) ** 0.5)
                nn.init.zeros_(module.bias)
        start_small(self.out)

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """patch (M, C, P, P) of x_t, context (M, D) -> velocity (M, C, P, P).

        For G contexts of each patch, (G, M, D), it is (G, M, C, P, P), and the way down is computed once.
        """
        return (self._compiled or UNetHead._paint)(self, patch, context, self._kernels(patch.shape[-1]))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As elsewhere; the composition of kernels stays outside, where they can be kept."""
        self._compiled = torch.compile(UNetHead._paint, *args, **kwargs)

    def _kernels(self, side: int) -> list[Stage]:
        """Of each stage, from the patch's side."""
        stages = []
        for i, (down, up, merge) in enumerate(zip(self.down, self.up, self.merge)):
            half = (side + 1) // 2
            lower, upper = None, None
            if side == 2 and _plain(down):
                lower = self._kept(("down", i), (down.weight, down.bias), _of_two_pixels)
            if side == 2 * half and _plain(up, merge):
                weights = (up.weight, up.bias, merge.weight, merge.bias)
                upper = self._kept(("up", i, half), weights, functools.partial(compose, side=half))
            stages.append(Stage(lower, upper))
            side = half
        return stages

    def _paint(self, patch: Tensor, context: Tensor, stages: list[Stage]) -> Tensor:
        h = patch.contiguous(memory_format=torch.channels_last)
        skips = []
        for down, stage in zip(self.down, stages):
            h = F.silu(_convolved(down, h) if stage.down is None else _product(h, *stage.down))
            skips.append(h)
            h = F.max_pool2d(h, 2, ceil_mode=True)
        g = len(context) if context.dim() == 3 else 1
        h = F.silu(self._join(h, context, g))
        for i in reversed(range(len(self.up))):
            h = self._stage_up(i, h, skips[i], g, stages[i].up)
        return _convolved(self.out, h).view(*context.shape[:-1], *patch.shape[1:])

    def _join(self, h: Tensor, context: Tensor, g: int) -> Tensor:
        """The bottleneck of h (M, w, side, side) and contexts (M, D) or (G, M, D) -> (G M, w, side, side)."""
        if not _plain(self.bottleneck):
            cells = context.flatten(0, -2)[..., None, None].expand(-1, -1, *h.shape[-2:])
            return self.bottleneck(torch.cat([h.repeat(g, 1, 1, 1), cells], dim=1))
        # as its values lie, so that its gradient's lie alike, which DistributedDataParallel wants
        matrix, pixels = self.bottleneck.weight.permute(0, 2, 3, 1).flatten(1), h.shape[1]
        contexts = F.linear(context, matrix[:, pixels:], self.bottleneck.bias)
        if h.shape[-1] == 1:
            return (F.linear(h.flatten(1), matrix[:, :pixels]) + contexts).flatten(0, -2)[..., None, None]
        return (F.conv2d(h, matrix[:, :pixels, None, None]) + contexts[..., None, None]).flatten(0, -4)

    def _stage_up(self, i: int, h: Tensor, skip: Tensor, g: int, composed: Kernels | None) -> Tensor:
        """h (G M, w, side, side) and skip (M, w, 2 side, 2 side) -> (G M, w', 2 side, 2 side)."""
        if composed is None:
            height, width = skip.shape[-2:]
            joined = torch.cat([self.up[i](h)[..., :height, :width], skip.repeat(g, 1, 1, 1)], dim=1)
            return F.silu(self.merge[i](joined))
        kernel, skip_kernel, bias = composed
        if h.shape[-1] == 1:
            raised, seen = _product(h, kernel), _product(skip, skip_kernel, bias)
        else:
            raised = F.conv_transpose2d(h, kernel, stride=2, padding=1)
            seen = F.conv2d(skip, skip_kernel, padding=1)
            # in the order in which the pixels lie, or the gradient's sum takes 25 times as long on a CPU
            seen = (seen.permute(0, 2, 3, 1) + bias).permute(0, 3, 1, 2)
        if g == 1:
            return F.silu(raised + seen)
        return F.silu(raised.unflatten(0, (g, -1)) + seen).flatten(0, 1)

    def forget_kernels(self) -> None:
        """After weights may have changed without a trace: by a fused optimizer, or through their `.data`."""
        self.kept_kernels.clear()

    def __getstate__(self) -> dict[str, Any]:
        """As elsewhere, a copy is not compiled; and it keeps kernels of its own."""
        return {**super().__getstate__(), "_compiled": None, "kept_kernels": {}}

    def train(self, mode: bool = True) -> "UNetHead":
        """As elsewhere; forgets kept kernels."""
        self.forget_kernels()
        return super().train(mode)

    def _kept(self, name: tuple, weights: tuple[Tensor, ...], make: Callable[..., Kernels]) -> Kernels:
        """What `make` makes of weights; in evaluation mode without gradients kept from call to call, until a weight
        changes or moves, as far as it leaves a trace."""
        kept = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not kept or any(weight.is_inference() or weight.is_meta for weight in weights):
            return make(*weights)
        weight = weights[0]
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        state = dtype, [(w.data_ptr(), w._version) for w in weights]
        entry = self.kept_kernels.get(name)  # once: another thread's call may forget it in between
        if entry is None or entry[0] != state:
            with torch.autocast(device, enabled=False):
                parts = make(*(w.float() for w in weights))
            entry = self.kept_kernels[name] = state, tuple(_laid_out(part.to(dtype)) for part in parts)
        return entry[1]


def _laid_out(kernel: Tensor) -> Tensor:
    return kernel.contiguous(memory_format=torch.channels_last if kernel.dim() == 4 else torch.contiguous_format)


def _plain(*layers: nn.Module) -> bool:
    """Whether layers may be computed by their weights alone, as convolutions."""
    return untouched(layers, nn.Conv2d, nn.ConvTranspose2d)


def _convolved(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """layer(h). Where code is compiled for a CUDA device, a product if its channels are few: a convolution of three
    takes several times as long there (benchmarks/LOG.md)."""
    if torch.compiler.is_dynamo_compiling() and h.is_cuda and _plain(layer):
        few = min(layer.in_channels, layer.out_channels) < ALIGNED
        if few and (layer.kernel_size == (1, 1) or not h.requires_grad):
            return convolved_as_product(layer, h)
    return layer(h)


def convolved_as_product(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """layer(h), 1 x 1 or of padding 1, as one product of all that it sees of each pixel; zeros fill up what is no
    multiple of eight.

    Args:
        h: (M, in, side, side).
    """
    if layer.kernel_size == (1, 1):
        seen = h.permute(0, 2, 3, 1)
    else:
        seen = F.pad(h, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 4, 5, 1).flatten(3)
    matrix = layer.weight.permute(0, 2, 3, 1).flatten(1)
    more_in, more_out = -matrix.shape[1] % ALIGNED, -layer.out_channels % ALIGNED
    matrix, bias = _filled_up(matrix, 0, more_in, 0, more_out), _filled_up(layer.bias, 0, more_out)
    y = F.linear(_filled_up(seen, 0, more_in), matrix, bias)
    return y[..., : layer.out_channels].contiguous().permute(0, 3, 1, 2)


def _filled_up(x: Tensor, *zeros: int) -> Tensor:
    """As `F.pad`, which copies x where there is nothing to add, too."""
    return F.pad(x, zeros) if any(zeros) else x


def as_matrix(kernel: Tensor) -> Tensor:
    """A 3 x 3 convolution (out, in, 3, 3) of images of 2 x 2 pixels, in which every pixel sees all four, as a matrix
    (4 out, 4 in), pixels in raster order before channels."""
    seen = [kernel[..., 1 - i : 3 - i, 1 - j : 3 - j] for i in (0, 1) for j in (0, 1)]
    return torch.stack(seen).permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)


def _of_two_pixels(kernel: Tensor, bias: Tensor) -> Kernels:
    return as_matrix(kernel), bias.repeat(4)


def _product(h: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Images h (M, in, side, side) times a matrix (4 out, side^2 in) -> (M, out, 2, 2)."""
    return F.linear(h.permute(0, 2, 3, 1).flatten(1), matrix, bias).unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)


def compose(up: Tensor, up_bias: Tensor, merge: Tensor, merge_bias: Tensor, side: int) -> Kernels:
    """A 2 x 2 transposed convolution of stride 2 and the 3 x 3 convolution of its result and a skip, as one each.

    Nothing non-linear stands between the two, so their kernels compose to one of 4 x 4: 16 multiplications per cell
    and pair of channels in place of 4 and 36.

    Args:
        up: (in, w, 2, 2), its bias (w,).
        merge: (out, w + skip, 3, 3), its bias (out,).
        side: pixels of the smaller image, which is square.

    Returns:
        The kernel (in, out, 4, 4) for stride 2 and padding 1; the kernel of the skip (out, skip, 3, 3); and the bias
        (2 side, 2 side, out), which knows of the zeros around the image. For a single pixel matrices (4 out, in) and
        (4 out, 4 skip) and their bias (4 out,), as `as_matrix` orders them.
    """
    middle = up.shape[1]
    if side == 1:
        matrix, raises = as_matrix(merge[:, :middle]), up.permute(2, 3, 1, 0).flatten(0, 2)  # (4 out, 4 w), (4 w, in)
        bias = F.linear(up_bias.repeat(4), matrix, merge_bias.repeat(4))
        return matrix @ raises, as_matrix(merge[:, middle:]), bias
    # as a transposed convolution, whose gradient takes half the time of the convolution's with padding
    kernel = F.conv_transpose2d(up, merge[:, :middle].transpose(0, 1).flip(-1, -2))
    flat = up_bias.view(1, -1, 1, 1).expand(1, middle, 2 * side, 2 * side)
    bias = F.conv2d(flat, merge[:, :middle], merge_bias, padding=1)
    return kernel, merge[:, middle:], bias[0].permute(1, 2, 0)
