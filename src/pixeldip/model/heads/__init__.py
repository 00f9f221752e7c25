"""Patch Detailer Heads: one file and one row each.

A head is built with (in_channels, patch_size, hidden_size, width, depth), where width and
depth are None unless the user set them, for any P from 4, and maps patch (M, C, P, P) and context (M, D) to a
velocity (M, C, P, P). Its `context_type` turns the backbone's tokens into that context. A head with
`takes_several_contexts` also takes (G, M, D), G contexts of each patch, and does once what depends on the patch alone.
"""

from torch import nn

from .attention import AttentionHead
from .coordinate_mlp import CoordinateMLPHead
from .linear import LinearHead
from .mlp import MLPHead
from .unet import UNetHead

HEADS: dict[str, type[nn.Module]] = {
    "unet": UNetHead,
    "coordinate_mlp": CoordinateMLPHead,
    "attention": AttentionHead,
    "mlp": MLPHead,
    "linear": LinearHead,
}
