"""The Inception network of 2015 that FID, sFID, the Inception Score, precision and recall are defined on.

Our code for the graph `classify_image_graph_def.pb` (Szegedy et al. 2015) with the module names of the
published PyTorch conversion of its weights, `weights-inception-2015-12-05-6726825d.pth`, which this module loads.
Input preparation, layers and feature order are those of ADM's evaluator (Dhariwal & Nichol 2021).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299
POOL_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
CLASSES = 1008


def resize_tf1(x: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's ResizeBilinear, neither aligned corners nor half-pixel centres: float32 (..., H, W).

    Output pixel i looks at input position i * H / height, so images move by up to half a pixel; there is no
    antialiasing. Every operation is rounded in TensorFlow's order, which makes the result equal bit for bit on a CPU.
    """

    def places(size: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
        scale = torch.tensor(size, dtype=torch.float32) / target
        position = torch.arange(target, dtype=torch.float32) * scale
        low = position.floor().long()
        return low.to(x.device), (low + 1).clamp(max=size - 1).to(x.device), (position - low).to(x.device)

    top, bottom, dy = places(x.shape[-2], height)
    left, right, dx = places(x.shape[-1], width)
    upper, lower = x[..., top, :], x[..., bottom, :]
    upper = upper[..., left] + (upper[..., right] - upper[..., left]) * dx
    lower = lower[..., left] + (lower[..., right] - lower[..., left]) * dx
    return upper + (lower - upper) * dy[:, None]


class _Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    # TensorFlow leaves the padding out of the mean
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _Mixed35(nn.Module):
    """35x35 (Mixed_5b ... 5d)."""

    def __init__(self, inputs: int, pool: int):
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _Reduce17(nn.Module):
    """35x35 to 17x17 (Mixed_6a)."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class _Mixed17(nn.Module):
    """17x17 (Mixed_6b ... 6e): 7x7 convolutions as 1x7 and 7x1, `width` channels between them."""

    def __init__(self, width: int):
        super().__init__()
        across, down = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, width, 1)
        self.branch7x7_2 = _Conv(width, width, **across)
        self.branch7x7_3 = _Conv(width, 192, **down)
        self.branch7x7dbl_1 = _Conv(768, width, 1)
        self.branch7x7dbl_2 = _Conv(width, width, **down)
        self.branch7x7dbl_3 = _Conv(width, width, **across)
        self.branch7x7dbl_4 = _Conv(width, width, **down)
        self.branch7x7dbl_5 = _Conv(width, 192, **across)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class _Reduce8(nn.Module):
    """17x17 to 8x8 (Mixed_7a)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], 1)


class _Mixed8(nn.Module):
    """8x8 (Mixed_7b, 7c). The last one pools by maximum: an oddity of the 2015 graph that FID rests on."""

    def __init__(self, inputs: int, pool_by_maximum: bool):
        super().__init__()
        self.pool_by_maximum = pool_by_maximum
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pool_by_maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class Inception(nn.Module):
    """The network up to its pooled features, with the weights of its classifier.

    `forward` takes uint8 or float images (B, 3, H, W) from 0 to 255 and returns

    * pool (B, 2048): `pool_3:0`;
    * spatial (B, 2023): the first 7 channels of `mixed_6/conv:0`, 17x17, in the order (row, column, channel).

    The logits of the Inception Score are `pool @ fc.weight.T`, without the bias, as in ADM.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _Mixed35(192, 32)
        self.Mixed_5c = _Mixed35(256, 64)
        self.Mixed_5d = _Mixed35(288, 64)
        self.Mixed_6a = _Reduce17(288)
        self.Mixed_6b = _Mixed17(128)
        self.Mixed_6c = _Mixed17(160)
        self.Mixed_6d = _Mixed17(160)
        self.Mixed_6e = _Mixed17(192)
        self.Mixed_7a = _Reduce8()
        self.Mixed_7b = _Mixed8(1280, pool_by_maximum=False)
        self.Mixed_7c = _Mixed8(2048, pool_by_maximum=True)
        self.fc = nn.Linear(POOL_DIM, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize_tf1(images.float(), SIZE, SIZE) - 128) * 0.0078125
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # mixed_6/conv is the first branch of Mixed_6d after its ReLU, so the first channels of the block
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean((2, 3)), spatial
