"""Linear layers whose product is one of 8-bit integers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

LARGEST = 127
ROTATED_TOGETHER = 64  # channels; a power of two


class Int8Linear(nn.Module):
    """A linear layer for inference, its weights rounded to int8 with a scale for each output, its input with one for
    each token, found as it comes.

    Weights and inputs are scaled so that the largest of a row becomes 127; sums are exact, in int32. Results are off
    by about 1% of their standard deviation.

    Args:
        linear: the layer in floating point.
        rotated: whether input and weights are rotated, which does not change their product, before they are rounded: 64
            channels share what is largest among them, so that single outliers do not make a row's scale coarse.
    """

    def __init__(self, linear: nn.Linear, rotated: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        rotation = None
        if rotated:
            rotation = hadamard(ROTATED_TOGETHER, weight.device)
            with torch.autocast(weight.device.type, enabled=False):
                weight = rotate(weight, rotation)
        values, scale = quantized(weight)
        self.register_buffer("values", values)  # (out, in) int8; if rotated, in is padded to a multiple of 64
        self.register_buffer("scale", scale.squeeze(1))  # (out,) float32
        self.register_buffer("rotation", rotation)  # (64, 64) float32, or None
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype.

        Raises:
            UserError: if a gradient is asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("layers in int8 have no gradient: train the model in floating point")
        rows = x.flatten(0, -2) if self.rotation is None else rotate(x, self.rotation.to(x.dtype))
        values, scale = quantized(rows.float())
        y = torch._int_mm(values, self.values.t()).float() * scale * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def _apply(self, *args: Any, **kwargs: Any) -> "Int8Linear":
        """As elsewhere, but the precision of its buffers is not anybody's to change."""
        kept = dict(self.named_buffers())
        super()._apply(*args, **kwargs)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x (M, K) as (values (M, K) int8, scale (M, 1)), so that x is about values * scale."""
    largest = x.abs().amax(1, keepdim=True).clamp(min=LARGEST * torch.finfo(x.dtype).tiny)  # rows of zeros
    return (x * (LARGEST / largest)).round().to(torch.int8), largest / LARGEST


def hadamard(size: int, device: torch.device) -> Tensor:
    """A symmetric orthogonal matrix (size, size), float32, its entries of one magnitude (Sylvester)."""
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while len(matrix) < size:
        upper, lower = torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([upper, lower])
    return matrix / size**0.5


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x (…, K) as rows (M, K), each part of as many channels as `rotation` has multiplied by it; zeros fill the last
    part up.

    One reshape before the product and one after it, since inductor copies element by element where there are two.
    """
    size = len(rotation)
    if missing := -x.shape[-1] % size:
        x = F.pad(x, (0, missing))
    return (x.reshape(-1, size) @ rotation).reshape(-1, x.shape[-1])
