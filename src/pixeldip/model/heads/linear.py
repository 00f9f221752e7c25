"""No Patch Detailer Head: DiT's own final layer (the DiT-only rows of Table 2).

M = B * N patches, C channels, P patch side, D hidden size.
"""

from torch import Tensor, nn

from ...errors import UserError
from ..backbone import AdaLNContext
from ..layers import start_small


class LinearHead(nn.Module):
    """One linear layer from the modulated token to its patch; the noisy pixels are not looked at again.

    Raises:
        UserError: if a width or depth is asked for; there is none to set.
    """

    context_type = AdaLNContext

    def __init__(
        self, in_channels: int, patch_size: int, hidden_size: int, width: int | None = None, depth: int | None = None
    ):
        super().__init__()
        if width is not None or depth is not None:
            raise UserError("head_width and head_depth mean nothing to head='linear'; leave them out, or say None")
        self.out = nn.Linear(hidden_size, in_channels * patch_size**2)
        start_small(self.out)

    def forward(self, patch: Tensor, context: Tensor) -> Tensor:
        """patch (M, C, P, P), context (M, D) -> velocity (M, C, P, P)."""
        return self.out(context).view(patch.shape)
