"""Where the Patch Detailer Head stands (Sec. 3.4, Fig. 5).

post: after the last block, as in the release. intermediate: half-way through the blocks; its refined patches are
projected back into the tokens, and DiT's own final layer makes the output. hybrid: both places, a head each.

B images, G conditions of each, N patches, C channels, P patch side, D hidden size.
"""

from torch import Tensor, nn

from .layers import xavier

PLACEMENTS = ("post", "intermediate", "hybrid")


def refine(context: nn.Module, head: nn.Module, patches: Tensor, s: Tensor, time: Tensor, c: Tensor, g: int) -> Tensor:
    """What a head makes of the noisy patches (B, N, C, P, P): (G B, N, C, P, P).

    Args:
        context: the head's, from tokens s (G B, N, D), time embedding and condition (G B, D).
        g: G, how many conditions there are for each image.
    """
    pixels, contexts = patches.flatten(0, 1), context(s, time, c).flatten(0, 1)
    if g == 1:
        refined = head(pixels, contexts)
    elif getattr(head, "takes_several_contexts", False):
        refined = head(pixels, contexts.unflatten(0, (g, -1)))
    else:
        refined = head(pixels.repeat(g, 1, 1, 1), contexts)
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
