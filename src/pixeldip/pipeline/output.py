"""What a call of the pipeline returns."""

import warnings
from dataclasses import dataclass

import numpy as np
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..images import to_pil

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class DiPPipelineOutput(BaseOutput):
    """images: as `output_type` asks; trajectory: the states asked for, if any."""

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[tuple[float, Tensor]] | None = None


def check_output_type(output_type: str, channels: int) -> None:
    """Raises UserError unless it is one of those there are, and images of so many channels can be put out as it."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type {output_type!r}: choose one of {', '.join(OUTPUT_TYPES)}")
    if output_type == "pil" and channels not in (1, 3):
        raise UserError(f'output_type "pil": pictures have 1 or 3 channels, the model {channels}; choose "np" or "pt"')


def put_out(x: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """Images x (B, C, H, W) in [-1, 1] as a call of the pipeline asks for them."""
    if output_type == "pil":
        finite = x.isfinite()
        if broken := int((~finite.flatten(1).all(1)).sum()):
            warnings.warn(
                f"{broken} of {len(x)} images hold values that are not finite, drawn in black: let the model compute "
                "in float32, guide less, or take another checkpoint",
                stacklevel=4,  # the caller of the pipeline, past torch.no_grad
            )
        return to_pil(x.where(finite, -1))
    if output_type == "latent":
        return x
    shares = (x.float() / 2 + 0.5).clamp(0, 1)
    return shares if output_type == "pt" else shares.permute(0, 2, 3, 1).cpu().numpy()
