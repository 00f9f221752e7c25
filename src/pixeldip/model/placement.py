"""Where the Patch Detailer Head stands (Sec. 3.4, Fig. 5).

post: after the last block, as in the release. intermediate: half-way through the blocks; its refined patches are
projected back into the tokens, and DiT's own final layer makes the output. hybrid: both places, a head each.

B batch, N patches, C channels, P patch side, M = B * N, D hidden size.
"""

from torch import Tensor, nn

PLACEMENTS = ("post", "intermediate", "hybrid")


def refine(context: nn.Module, head: nn.Module, patches: Tensor, s: Tensor, time: Tensor, c: Tensor) -> Tensor:
    """What a head makes of the noisy patches (B, N, C, P, P), like them.

    Args:
        context: the head's, from tokens s (B, N, D), time embedding and condition (B, D).
    """
    return head(patches.flatten(0, 1), context(s, time, c).flatten(0, 1)).view(patches.shape)


class Injection(nn.Module):
    """A head between blocks: the patches it makes are embedded and added to the tokens."""

    def __init__(self, context: nn.Module, detailer: nn.Module, patch_dim: int, hidden_size: int):
        super().__init__()
        self.context = context
        self.detailer = detailer
        self.project = nn.Linear(patch_dim, hidden_size)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, patches: Tensor, s: Tensor, time: Tensor, c: Tensor) -> Tensor:
        """Noisy patches (B, N, C, P, P), tokens s (B, N, D), time embedding, condition (B, D) -> tokens (B, N, D)."""
        return s + self.project(refine(self.context, self.detailer, patches, s, time, c).flatten(2))
