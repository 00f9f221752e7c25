"""Where the Patch Detailer Head stands (Sec. 3.4, Fig. 5).

post: after the last block, as in the release. intermediate: half-way through the blocks; its refined patches are
projected back into the tokens, and DiT's own final layer makes the output. hybrid: both places, a head each.

B images, G conditions of each, N patches, C channels, P patch side, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .layers import xavier

PLACEMENTS = ("post", "intermediate", "hybrid")


def refine(
    context: Callable[..., Tensor],
    head: nn.Module,
    patches: Tensor,
    s: Tensor,
    time: Tensor,
    c: Tensor,
    g: int,
    parts: int = 1,
) -> Tensor:
    """What a head makes of the noisy patches (B, N, C, P, P): (G B, N, C, P, P).

    Args:
        context: the head's, from tokens s (G B, N, D), time embedding and condition (G B, D).
        g: G, how many conditions there are for each image.
        parts: in which the head works on the patches, one after another.
    """
    pixels, contexts = patches.flatten(0, 1), context(s, time, c).flatten(0, 1)
    if g > 1 and getattr(head, "takes_several_contexts", False):
        contexts = contexts.unflatten(0, (g, -1))
    elif g > 1:
        pixels = pixels.repeat(g, 1, 1, 1)
    if parts == 1:
        refined = head(pixels, contexts)
    else:
        pieces = zip(pixels.chunk(parts), contexts.chunk(parts, dim=-2))
        refined = torch.cat([head(*piece) for piece in pieces], dim=-4)
    return refined.view(-1, *patches.shape[1:])


class Injection(nn.Module):
    """A head between blocks: the patches it makes are embedded and added to the tokens."""

    def __init__(self, context: nn.Module, detailer: nn.Module, patch_dim: int, hidden_size: int):
        super().__init__()
        self.context = context
        self.detailer = detailer
        self.project = nn.Linear(patch_dim, hidden_size)
        xavier(self.project)

    def forward(self, patches: Tensor, s: Tensor, time: Tensor, c: Tensor, g: int) -> Tensor:
        """Patches (B, N, C, P, P), tokens (G B, N, D), time embedding and condition (G B, D) -> tokens (G B, N, D)."""
        return s + self.project(refine(self.context, self.detailer, patches, s, time, c, g).flatten(2))
