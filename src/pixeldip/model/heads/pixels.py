"""A patch as a sequence of pixels, for heads that look at pixels one by one.

M = B * N patches, C channels, P patch side.
"""

import torch
from torch import Tensor

FREQUENCIES = 8
POSITION_FEATURES = FREQUENCIES**2


def to_pixels(patch: Tensor) -> Tensor:
    """(M, C, P, P) -> (M, P*P, C + 64), row by row, each pixel with its `position_features`."""
    pixels = patch.flatten(2).transpose(1, 2)
    positions = position_features(patch.shape[-1], patch.device).to(pixels.dtype)
    return torch.cat([pixels, positions.expand(pixels.shape[0], -1, -1)], dim=-1)


def from_pixels(pixels: Tensor, shape: torch.Size) -> Tensor:
    """(M, P*P, C) -> (M, C, P, P), the shape given."""
    return pixels.transpose(1, 2).reshape(shape)


def position_features(patch_size: int, device: torch.device) -> Tensor:
    """Where in the patch a pixel stands: (P*P, 64) float32, as in PixNerd's checkpoints.

    Feature (i, j) of the pixel in column x and row y, both scaled to [0, 1], is
    cos(pi f_i x) cos(pi f_j y) / (1 + f_i f_j), for the 8 frequencies from 0 to 8.
    """
    places = torch.linspace(0, 1, patch_size, device=device)
    frequencies = torch.linspace(0, FREQUENCIES, FREQUENCIES, device=device)
    waves = torch.cos(torch.pi * places[:, None] * frequencies)  # (P, 8)
    products = waves[None, :, :, None] * waves[:, None, None, :]  # row y, column x, f of x, f of y
    return (products / (1 + frequencies[:, None] * frequencies)).flatten(0, 1).flatten(1)
