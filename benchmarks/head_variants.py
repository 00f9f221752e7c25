"""A study with another U-Net head: with a straight path for the pixels, or with other initial weights.

    python benchmarks/head_variants.py SIDE GAIN study heads --contenders unet …

SIDE: 1 or 3 adds to the head's output its noisy pixels, convolved with a kernel of so many pixels a side, which a
linear layer of the context makes for each patch; 0 adds nothing. GAIN multiplies what the convolutions before the last
start with; 1 is He's variance, 0.41 torch's default. The rest is the command line of `pixeldip`, whose reports know
nothing of it.
"""

import sys

import torch.nn.functional as F
from torch import Tensor, nn

from pixeldip.cli import main
from pixeldip.model.heads import HEADS
from pixeldip.model.heads.unet import UNetHead


def varied_head(side: int, gain: float) -> type[UNetHead]:
    class VariedHead(UNetHead):
        def __init__(self, in_channels: int, patch_size: int, hidden_size: int, *sizes: int | None):
            super().__init__(in_channels, patch_size, hidden_size, *sizes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module is not self.out:
                    module.weight.data *= gain
            self.kernel = nn.Linear(hidden_size, in_channels * in_channels * side**2) if side else None
            if self.kernel is not None:
                nn.init.zeros_(self.kernel.weight)
                nn.init.zeros_(self.kernel.bias)

        def forward(self, patch: Tensor, context: Tensor) -> Tensor:
            painted = super().forward(patch, context)
            if self.kernel is None:
                return painted
            seen = F.unfold(patch, side, padding=side // 2)  # (M, C side^2, P P)
            kernels = self.kernel(context).unflatten(-1, (patch.shape[1], -1))  # (..., M, C, C side^2)
            return painted + (kernels @ seen.to(kernels.dtype)).view_as(painted)

    return VariedHead


if __name__ == "__main__":
    side, gain, *arguments = sys.argv[1:]
    HEADS["unet"] = varied_head(int(side), float(gain))
    sys.argv[1:] = arguments
    sys.exit(main())
