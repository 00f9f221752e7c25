"""FLOPs that training takes."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..model import DiP


def training_flops(model: DiP, height: int, width: int) -> int:
    """FLOPs of one image's forward and backward pass, as torch counts them: frozen weights have no gradient to compute,
    and what gradient checkpointing computes again does not count.

    It is what an image more in a batch takes: kernels that are composed once for a batch do not count. The shapes are
    enough; nothing is computed.
    """
    model = copy.deepcopy(model).to("meta").train()
    model.disable_gradient_checkpointing()
    one, two = (_pass_flops(model, images, height, width) for images in (1, 2))
    return two - one


def _pass_flops(model: DiP, images: int, height: int, width: int) -> int:
    x = torch.zeros(images, model.config.in_channels, height, width, device="meta")
    t, y = torch.zeros(images, device="meta"), torch.zeros(images, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(x, t, y).sum().backward()
    return counter.get_total_flops()
