"""The alternative: DiT-XL/2 in a VAE's latent space (Peebles & Xie 2023), through diffusers, random weights."""

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch import Tensor

from ..errors import UserError
from .timing import Step

STEPS = 250  # as in Table 1
DOWNSAMPLING = 8


class LatentModel:
    """DiT-XL/2 and Stable Diffusion's VAE for images of a size.

    Raises:
        UserError: if the size is no multiple of 16 pixels, or not square.
    """

    def __init__(self, size: tuple[int, int], batch: int, device: torch.device, precision: torch.dtype):
        height, width = size
        if height != width or height % (2 * DOWNSAMPLING):
            raise UserError(f"DiT-XL/2 makes squares of multiples of {2 * DOWNSAMPLING} pixels, not {height}x{width}")
        side = height // DOWNSAMPLING
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=side,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        self.vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        for network in (self.transformer, self.vae):
            network.eval().requires_grad_(False).to(device).type(precision)
        self.x = torch.randn(batch, 4, side, side, device=device, dtype=precision)
        self.labels = torch.tensor([0] * batch + [1000] * batch, device=device)

    def step(self) -> Step:
        """One guided step: both branches, as its pipeline does."""

        @torch.no_grad()
        def step() -> Tensor:
            both = torch.cat([self.x, self.x])
            t = torch.full((len(both),), 500, device=both.device)
            return self.transformer(both, timestep=t, class_labels=self.labels).sample

        return step

    def decode(self) -> Step:
        """The images of the batch from their latents."""

        @torch.no_grad()
        def decode() -> Tensor:
            return self.vae.decode(self.x).sample

        return decode
