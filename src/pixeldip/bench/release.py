"""The network the way the release runs it, as a baseline to measure against and an oracle to test against.

Complex rotary embedding, float32 weights (under autocast, if at all), every layer by itself, both guidance branches at
every step. It is written from the published facts about the release, and shares no layer with `pixeldip.model`, only
the tensors' names, so that it loads a `DiP`'s weights.

B batch, N patches, h heads, d channels of one, D hidden size, P patch side.
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import DiP


class _Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


def _rotations(rows: int, columns: int, head_dim: int) -> Tensor:
    """Complex (N, d / 2): x and y rotations in turn."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 4).float() / head_dim)
    y, x = torch.meshgrid(torch.linspace(0, 16, rows), torch.linspace(0, 16, columns), indexing="ij")
    angles = torch.stack([torch.outer(p.flatten(), frequencies) for p in (x, y)], dim=-1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def _rotate(x: Tensor, rotations: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations).flatten(3).type_as(x)


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm, self.k_norm = _Norm(hidden_size // num_heads), _Norm(hidden_size // num_heads)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k = _rotate(self.q_norm(q), rotations), _rotate(self.k_norm(k), rotations)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class _MLP(nn.Module):
    def __init__(self, hidden_size: int, inner: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden_size, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, inner: int):
        super().__init__()
        self.norm1, self.norm2 = _Norm(hidden_size), _Norm(hidden_size)
        self.attention = _Attention(hidden_size, num_heads)
        self.mlp = _MLP(hidden_size, inner)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, c: Tensor, rotations: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotations)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class _Time(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.exp(-math.log(10.0) * torch.arange(128, device=t.device) / 128)
        return self.fc2(F.silu(self.fc1(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class _Backbone(nn.Module):
    def __init__(self, patch_dim: int, hidden_size: int, depth: int, num_heads: int, inner: int, classes: int):
        super().__init__()
        self.patch_embed = nn.Linear(patch_dim, hidden_size)
        self.time_embed = _Time(hidden_size)
        self.class_embed = nn.Embedding(classes + 1, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, inner) for _ in range(depth))


class _UNet(nn.Module):
    def __init__(self, widths: Sequence[int], hidden_size: int, channels: int):
        super().__init__()
        ins, merged = [channels, *widths[:-1]], [widths[0], *widths[:-1]]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(ins, widths))
        self.bottleneck = nn.Conv2d(widths[-1] + hidden_size, widths[-1], 1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(w, w, 2, stride=2) for w in widths)
        self.merge = nn.ModuleList(nn.Conv2d(2 * a, b, 3, padding=1) for a, b in zip(widths, merged))
        self.out = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(F.silu(down(x)))
            x = F.max_pool2d(skips[-1], 2)
        s = s[:, :, None, None].expand(-1, -1, *x.shape[-2:])
        x = F.silu(self.bottleneck(torch.cat([x, s], dim=1)))
        for up, merge, skip in zip(reversed(self.up), reversed(self.merge), reversed(skips)):
            x = F.silu(merge(torch.cat([up(x), skip], dim=1)))
        return self.out(x)


def has_releases_form(model: DiP) -> bool:
    """Whether a model is of the one kind the release knows, whose patches can be halved at every stage."""
    config = model.config
    kind = (config.head, config.placement, config.prediction) == ("unet", "post", "velocity")
    return kind and config.patch_size % 2 ** len(model.detailer.down) == 0


class ReleaseDiP(nn.Module):
    """DiP with the U-Net head after the last block: forward(x, t, y) -> velocity, as `DiP`'s."""

    def __init__(self, model: DiP):
        super().__init__()
        config = model.config
        self.null_class = config.num_classes
        inner = model.backbone.blocks[0].mlp.gate.out_features
        self.patch_size = config.patch_size
        self.head_dim = config.hidden_size // config.num_heads
        self.backbone = _Backbone(
            config.in_channels * config.patch_size**2,
            config.hidden_size,
            config.depth,
            config.num_heads,
            inner,
            config.num_classes,
        )
        widths = [layer.out_channels for layer in model.detailer.down]
        self.detailer = _UNet(widths, config.hidden_size, config.in_channels)
        self.load_state_dict(model.state_dict())
        self.eval()

    def compiled(self) -> "ReleaseDiP":
        """A copy with compiled blocks and head."""
        network = copy.deepcopy(self)
        for module in (*network.backbone.blocks, network.detailer):
            module.compile(dynamic=False)
        return network

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        b, _, height, width = x.shape
        p, net = self.patch_size, self.backbone
        patches = F.unfold(x, p, stride=p).transpose(1, 2)  # (B, N, C P P)
        rotations = _rotations(height // p, width // p, self.head_dim).to(x.device)
        time = net.time_embed(t).unsqueeze(1)
        c = F.silu(time + net.class_embed(y).unsqueeze(1)).squeeze(1)
        s = net.patch_embed(patches)
        for block in net.blocks:
            s = block(s, c, rotations)
        s = F.silu(time + s)
        pixels = patches.reshape(-1, x.shape[1], p, p)
        out = self.detailer(pixels, s.reshape(-1, s.shape[-1])).reshape(b, -1, x.shape[1] * p * p)
        return F.fold(out.transpose(1, 2).float(), (height, width), p, stride=p)


def release_step(network: ReleaseDiP, x: Tensor, t: float, dt: float, y: Tensor, null: int, scale: float) -> Tensor:
    """One Euler step of guidance the release's way: both branches, whether or not the scale asks for it."""
    both = network(torch.cat([x, x]), x.new_full((2 * len(x),), t), torch.cat([y, torch.full_like(y, null)]))
    c, u = both.chunk(2)
    return x + dt * (u + scale * (c - u))
