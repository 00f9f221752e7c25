"""DiP: the backbone on large patches and the Patch Detailer Head on their pixels (Sec. 3.3).

B batch, C channels, H x W image, P patch side, N = (H / P)(W / P) patches, M = B * N, D hidden size.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..errors import UserError
from .backbone import Backbone
from .heads import HEADS
from .presets import preset_config

PREDICTIONS = ("velocity", "image")
NEAREST_DATA = 0.05  # 1 - t is held above this where a predicted image is divided by it


class DiP(ModelMixin, ConfigMixin):
    """Velocity network in pixel space: v = model(x, t, y).

    Args:
        in_channels: image channels C.
        patch_size: P; H and W of every input must be multiples of it.
        hidden_size: D, the width of the backbone.
        depth: number of DiT blocks.
        num_heads: attention heads; D / num_heads must be a multiple of 4 (2-D rotary positions).
        mlp_ratio: the SwiGLU inner size is int(2 * mlp_ratio * D / 3).
        num_classes: classes; label `num_classes` is the null class. 0 makes an unconditional model.
        head: a name from `pixeldip.model.heads.HEADS`; "linear" is the DiT-only baseline.
        head_width: base channels of the head; None for the head's own default.
        head_depth: down/up stages of the head; None for as many as reach 1 x 1, at most 4.
        prediction: what the head puts out: "velocity" (Eq. 5, the release), or "image", the clean image,
            from which the velocity (image - x_t) / (1 - t) follows (JiT, Li & He 2025). A model keeps it
            for life, and `forward` returns a velocity either way.

    Raises:
        UserError: if the sizes do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 16,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        head: str = "unet",
        head_width: int | None = None,
        head_depth: int | None = None,
        prediction: str = "velocity",
    ):
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
        if num_classes < 0:
            raise UserError(f"num_classes={num_classes}: must be at least 0 (0 makes an unconditional model)")
        if hidden_size % (4 * num_heads):
            raise UserError(
                f"hidden_size={hidden_size} with num_heads={num_heads}: hidden_size must be a multiple of "
                f"4 * num_heads = {4 * num_heads}"
            )
        if head not in HEADS:
            raise UserError(f"head={head!r}: choose one of {', '.join(HEADS)}")
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction={prediction!r}: choose one of {', '.join(PREDICTIONS)}")
        patch_dim = in_channels * patch_size**2
        self.backbone = Backbone(patch_dim, hidden_size, depth, num_heads, mlp_ratio, num_classes)
        self.context = HEADS[head].context_type(hidden_size)
        self.detailer = HEADS[head](in_channels, patch_size, hidden_size, head_width, head_depth)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "DiP":
        """As in diffusers; the head's convolutions come back channels-last, as they were built."""
        model = super().from_pretrained(*args, **kwargs)
        model.detailer.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiP":
        """A freshly initialised model of a named size, for instance "dip-xl/16"; keywords override its row."""
        return cls(**{**preset_config(name), **overrides})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity at the noisy image.

        Args:
            x: x_t (B, C, H, W); images lie in [-1, 1], H and W are multiples of P.
            t: (B,) times in [0, 1], 0 noise, 1 data.
            y: (B,) integer class labels; `num_classes` is the null class.

        Returns:
            (B, C, H, W) in x's dtype.

        Raises:
            UserError: if H or W is not a multiple of P.
        """
        p = self.config.patch_size
        check_size(x.shape[-2], x.shape[-1], p)
        rows, columns = x.shape[-2] // p, x.shape[-1] // p
        # (B, C, H, W) -> (B, N, C, P, P): channel-major inside a patch, patches in raster order
        patches = x.unflatten(-1, (columns, p)).unflatten(-3, (rows, p)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        patches = patches.to(self.backbone.patch_embed.weight.dtype)
        s, time, c = self.backbone(patches.flatten(2), t, y, (rows, columns))
        context = self.context(s, time, c)
        v = self.detailer(patches.flatten(0, 1), context.flatten(0, 1))  # (M, C, P, P)
        v = v.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5)
        v = v.reshape(x.shape).to(x.dtype)
        if self.config.prediction == "image":
            v = (v - x) / (1 - t.to(x.dtype)).clamp(min=NEAREST_DATA).view(-1, 1, 1, 1)
        return v


def check_size(height: int, width: int, patch_size: int) -> None:
    """Raises UserError unless both sides are multiples of the patch size."""
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        raise UserError(
            f"an image of {height}x{width} pixels (height x width) cannot be cut into patches of {patch_size}x"
            f"{patch_size}: both sides must be multiples of {patch_size}"
        )
