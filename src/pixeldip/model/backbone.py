"""The Diffusion Transformer that builds the global structure (Sec. 3.3).

B batch, N patches in raster order, C image channels, P patch side, D hidden size.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Block, TimeEmbedding, modulate, rope_2d, sinusoids_2d, xavier


class Backbone(nn.Module):
    """DiT on flattened P x P patches, conditioned on time and class."""

    def __init__(
        self,
        patch_dim: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        absolute_positions: bool = False,
    ):
        super().__init__()
        self.hidden_size, self.head_dim = hidden_size, hidden_size // num_heads
        self.absolute_positions = absolute_positions
        self.gradient_checkpointing = False
        self.patch_embed = nn.Linear(patch_dim, hidden_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)  # the last row is the null class
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self._initialise()

    def _initialise(self) -> None:
        # Every residual branch starts closed (adaLN-Zero, Peebles & Xie 2023, Sec. 3.2): the modulation
        # is zero, so each gate is. The other layers keep unit-variance defaults.
        xavier(self)
        nn.init.normal_(self.class_embed.weight, std=0.25)  # about that of the time's embedding
        nn.init.normal_(self.time_embed.fc1.weight, std=0.02)
        nn.init.normal_(self.time_embed.fc2.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)

    def forward(
        self,
        patches: Tensor,
        t: Tensor,
        y: Tensor,
        grid: tuple[int, int],
        after_block: Callable[[int, Tensor, Tensor, Tensor], Tensor],
        modulations: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """patches (B, N, C*P*P), t (B,), y (G, B) for G labels of each image, grid (rows, columns).

        Args:
            after_block: given the number of blocks done (from 1), tokens (G B, N, D), time embedding (G B, D) and
                condition (G B, D), returns the tokens for the next block.
            modulations: (depth, G B, 6 D) of these t and y, if they were computed ahead.

        Returns:
            Tokens (G B, N, D), the time embedding (G B, D) and the condition c (G B, D).
        """
        time, c = self.conditions(t, y)
        rope = rope_2d(*grid, self.head_dim, device=patches.device)
        s = self.patch_embed(patches)
        if self.absolute_positions:
            s = s + sinusoids_2d(*grid, self.hidden_size, device=s.device).to(s.dtype)
        s = s.repeat(len(y), 1, 1)
        for i, block in enumerate(self.blocks, start=1):
            if self.gradient_checkpointing and self.training:
                s = self._gradient_checkpointing_func(block, s, c, rope)
            else:
                s = block(s, c, rope, None if modulations is None else modulations[i - 1])
            s = after_block(i, s, time, c)
        return s, time, c

    def conditions(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,), y (G, B) -> the time embedding (G B, D) and the condition c (G B, D)."""
        time = self.time_embed(t).repeat(len(y), 1)
        return time, F.silu(time + self.class_embed(y).flatten(0, 1))

    def modulations(self, t: Tensor, y: Tensor) -> Tensor:
        """The output of the blocks' modulation layers at times t (S,) for labels y (G, B): (S, depth, G B, 6 D)."""
        c = F.silu(self.time_embed(t)[:, None] + self.class_embed(y).flatten(0, 1))
        first, *others = self.blocks
        made = first.modulation(c)
        whole = made.new_empty(len(t), len(self.blocks), *made.shape[1:])  # a stack would need the memory twice
        whole[:, 0] = made
        for i, block in enumerate(others, start=1):
            whole[:, i] = block.modulation(c)
        return whole


class TimeContext(nn.Module):
    """The context of a Patch Detailer Head as in the release: s_global = silu(t_emb + s), no norm."""

    def __init__(self, hidden_size: int):
        super().__init__()

    def forward(self, s: Tensor, time: Tensor, c: Tensor) -> Tensor:
        return F.silu(time.unsqueeze(1) + s)


class AdaLNContext(nn.Module):
    """The context of a DiT-only model: LayerNorm without affine, modulated by c (DiT's final layer)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, s: Tensor, time: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        return modulate(self.norm(s), shift, scale)
