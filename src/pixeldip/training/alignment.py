"""REPA: the tokens of one block are held near those of a frozen image encoder (Yu et al. 2025).

B batch, N patches, D hidden size, E hidden size of the encoder.
"""

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..model import DiP
from ..processes import Processes
from ..recipe import AlignmentSection
from ..vision_models import IMAGENET_MEAN, IMAGENET_STD, load_vision_model, pixel_statistics


class Alignment:
    """The frozen encoder and the distance to it. No part of the network: it is neither trained, saved nor compiled.

    Args:
        encoder: a `transformers` vision model of patches, on the device it is to run on.
        mean, std: how it wants its pixels, given as 0 to 1.

    Raises:
        UserError: if the encoder has no patches.
    """

    def __init__(
        self,
        section: AlignmentSection,
        encoder: nn.Module,
        patch_size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.section, self.patch_size = section, patch_size
        self.encoder = getattr(encoder, "vision_model", encoder).eval().requires_grad_(False)
        config = getattr(encoder.config, "vision_config", encoder.config)
        theirs = getattr(config, "patch_size", None)
        if not isinstance(theirs, int):
            raise UserError(f"alignment.encoder {section.encoder}: not a vision transformer (no patch_size)")
        self.encoder_patch_size = theirs
        device = next(self.encoder.parameters()).device
        self.mean, self.std = (torch.tensor(tuple(values), device=device).view(1, -1, 1, 1) for values in (mean, std))
        takes = inspect.signature(self.encoder.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        try:
            self.width = self.target(torch.zeros(1, 3, 2 * patch_size, 3 * patch_size, device=device)).shape[-1]
        except UserError:
            raise
        except Exception as error:  # models of windows, of sounds, of other inputs fail in many ways
            reason = " ".join(str(error).split())
            raise UserError(
                f"alignment.encoder {section.encoder}: not a plain vision transformer ({reason})"
            ) from error

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """The encoder's patch tokens of clean images x (B, 3, H, W) in [-1, 1]: (B, N, E).

        The image is resized so that the encoder has as many patches a side as the model.
        """
        rows, columns = (side // self.patch_size for side in x.shape[-2:])
        size = rows * self.encoder_patch_size, columns * self.encoder_patch_size
        pixels = F.interpolate((x + 1) / 2, size, mode="bicubic", align_corners=False, antialias=True)
        pixels = (pixels.clamp(0, 1) - self.mean) / self.std
        tokens = self.encoder(pixel_values=pixels, **self.options).last_hidden_state
        if tokens.dim() != 3 or tokens.shape[1] < rows * columns:
            raise UserError(
                f"alignment.encoder {self.section.encoder}: gives {tuple(tokens.shape)} for {rows}x{columns} patches"
            )
        return tokens[:, -rows * columns :]  # class and register tokens come first

    def loss(self, projected: Tensor, target: Tensor) -> Tensor:
        """1 - cosine similarity of projected tokens and the encoder's, both (B, N, E): one value per image (B,)."""
        return 1 - F.cosine_similarity(projected.float(), target.float(), dim=-1).mean(1)


def load_alignment(section: AlignmentSection, patch_size: int, processes: Processes) -> Alignment:
    """The encoder a recipe names, in every process; the main one fetches it if it must be.

    Raises:
        UserError: in all of them, if it cannot be had or has no patches.
    """

    def load() -> Alignment:
        encoder = load_vision_model(section.encoder, "alignment.encoder").to(processes.device)
        return Alignment(section, encoder, patch_size, *pixel_statistics(section.encoder))

    return processes.main_first(load)


class AlignedDiP(nn.Module):
    """A model and the projector of its tokens, one network to compile and to distribute."""

    def __init__(self, model: DiP, section: AlignmentSection, width: int):
        super().__init__()
        self.model, self.block = model, section.block
        hidden, inner = model.config.hidden_size, section.projector_width
        self.projector = nn.Sequential(
            nn.Linear(hidden, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, width)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (B, C, H, W) and projected tokens (B, N, E)."""
        v, tokens = self.model(x, t, y, tokens_after=self.block)
        return v, self.projector(tokens)
