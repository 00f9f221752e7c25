"""Linear layers whose product is one of 8-bit integers."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

LARGEST = 127


class Int8Linear(nn.Module):
    """A linear layer for inference, its weights rounded to int8 with a scale for each output, its input with one for
    each token, found as it comes.

    Weights and inputs are scaled so that the largest of a row becomes 127; sums are exact, in int32. Results are off
    by about 1% of their standard deviation.

    Args:
        linear: the layer in floating point.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        values, scale = quantized(linear.weight.detach().float())
        self.register_buffer("values", values)  # (out, in) int8
        self.register_buffer("scale", scale.squeeze(1))  # (out,) float32
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), in x's dtype.

        Raises:
            UserError: if a gradient is asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError("layers in int8 have no gradient: train the model in floating point")
        values, scale = quantized(x.flatten(0, -2).float())
        y = torch._int_mm(values, self.values.t()).float() * scale * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).unflatten(0, x.shape[:-1])

    def _apply(self, *args: Any, **kwargs: Any) -> "Int8Linear":
        """As elsewhere, but the precision of its buffers is not anybody's to change."""
        values, scale = self.values, self.scale
        super()._apply(*args, **kwargs)
        self.values, self.scale = values.to(self.values.device), scale.to(self.scale.device)
        return self


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x (M, K) as (values (M, K) int8, scale (M, 1)), so that x is about values * scale."""
    scale = x.abs().amax(1, keepdim=True) / LARGEST
    scale = scale.clamp(min=torch.finfo(x.dtype).tiny)  # rows of zeros
    return (x / scale).round().to(torch.int8), scale
