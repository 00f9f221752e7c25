"""Layers of the backbone: embeddings, 2-D rotary attention, SwiGLU, the DiT block; and how layers of all parts start.

B batch, N patches in raster order, D hidden size, h heads, d = D / h.
"""

import importlib.util
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if torch.version.cuda is not None and importlib.util.find_spec("triton") is not None:
    from . import kernels
else:
    kernels = None

ROPE_EXTENT = 16.0  # positions run over [0, 16] whatever the grid, as in the release
ROPE_BASE = 10000.0
TIME_FEATURES = 256
TIME_MAX_PERIOD = 10.0
FEW_TOKENS = 512


def xavier(module: nn.Module) -> None:
    """Draws the weights of linear layers, the module itself or in it, with Xavier's variance; biases are zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def start_small(out: nn.Linear | nn.Conv2d) -> None:
    """Draws the last layer of a head with a standard deviation of 0.01 / sqrt(fan-in): not zero, so that a gradient
    reaches the whole head from the first step."""
    nn.init.normal_(out.weight, std=0.01 * out.weight[0].numel() ** -0.5)
    nn.init.zeros_(out.bias)


def untouched(modules: Sequence[nn.Module], *kinds: type[nn.Module]) -> bool:
    """Whether modules are of these kinds and may be computed by their weights alone: adapters, hooks and offloading
    want to be called."""
    return all(
        type(m) in kinds and "forward" not in m.__dict__ and not m._forward_pre_hooks and not m._forward_hooks
        for m in modules
    )


def by_kernels(x: Tensor, *norms: nn.Module) -> bool:
    """Whether code is compiled for a CUDA device, where `kernels` take the place of norms and what follows on them.

    Not in eager code, which wants no Triton and no C compiler.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    return compiling and x.is_cuda and kernels is not None and untouched(norms, RMSNorm)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in float32 and returned in x's dtype."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of the time, cosines first: t (B,) in [0, 1] -> (B, 256) float32."""
    half = TIME_FEATURES // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(TIME_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(TIME_FEATURES, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(time_features(t).to(self.fc1.weight.dtype))))


def _angles(rows: int, columns: int, size: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Of each patch's column (x) and of its row (y), (N, size / 4) each: places times the frequencies
    10000^(-4i / size)."""
    frequencies = ROPE_BASE ** (-4.0 * torch.arange(size // 4, device=device, dtype=torch.float32) / size)
    x = torch.linspace(0, ROPE_EXTENT, columns, device=device).expand(rows, columns).flatten()
    y = torch.linspace(0, ROPE_EXTENT, rows, device=device)[:, None].expand(rows, columns).flatten()
    return x[:, None] * frequencies, y[:, None] * frequencies


def rope_2d(rows: int, columns: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 2-D rotary embedding for each channel, (N, 1, d) float32; the sines of a pair's first
    channel are negative.

    Channel pair 2i turns with the column (x), pair 2i + 1 with the row (y), both at
    frequency 10000^(-4i / d). Real arithmetic only, so that it compiles.
    """
    angles = torch.stack(_angles(rows, columns, head_dim, device), dim=-1).flatten(1)  # (N, d/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, cos], dim=-1).flatten(1)[:, None], torch.stack([-sin, sin], dim=-1).flatten(1)[:, None]


def sinusoids_2d(rows: int, columns: int, size: int, device: torch.device | None = None) -> Tensor:
    """Cosines and sines of each patch's column, then of its row: (N, size) float32, at the rotary positions."""
    x, y = _angles(rows, columns, size, device)
    return torch.cat([x.cos(), x.sin(), y.cos(), y.sin()], dim=-1)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the channel pairs (2j, 2j + 1) of x (B, N, h, d).

    Of the ways to write it, the one that inductor makes a single kernel of, with the norm before it
    (benchmarks/LOG.md).
    """
    cos, sin = rope
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v (B, h, N, d).

    In bf16 on a CPU torch's fused kernel is the slower way where tokens are few (benchmarks/LOG.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= FEW_TOKENS:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention with RMS-normalised queries and keys and 2-D rotary positions."""

    attend = staticmethod(attend)

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if by_kernels(x, self.q_norm, self.k_norm):
            q, k, v = kernels.queries_keys_values(qkv, self.q_norm.weight, self.k_norm.weight, rope, self.q_norm.eps)
        else:
            q, k, v = qkv.unbind(2)  # (B, N, h, d)
            q, k = apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope)
        attended = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP with inner size 2/3 of mlp_ratio * D, rounded down."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        inner = swiglu_inner(hidden_size, mlp_ratio)
        self.gate = nn.Linear(hidden_size, inner, bias=False)
        self.up = nn.Linear(hidden_size, inner, bias=False)
        self.down = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def swiglu_inner(hidden_size: int, mlp_ratio: float) -> int:
    return int(2 * int(hidden_size * mlp_ratio) / 3)


class Block(nn.Module):
    """DiT block; `modulation` is one linear layer on the condition, in the backbone c = silu(t_emb + y_emb)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, condition_size: int | None = None):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_ratio)
        self.modulation = nn.Linear(condition_size or hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor], modulation: Tensor | None = None) -> Tensor:
        """x (B, N, D), c (B, condition_size); modulation: what the layer of that name makes of c, if it is known."""
        if modulation is None:
            modulation = self.modulation(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        if by_kernels(x, self.norm1, self.norm2):
            normed = kernels.norm_modulate(x, modulation, self.norm1.weight, self.norm1.eps)
            attended = self.attention(normed, rope)
            x, normed = kernels.add_norm_modulate(x, attended, modulation, self.norm2.weight, self.norm2.eps)
        else:
            x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1), rope)
            normed = modulate(self.norm2(x), shift2, scale2)
        return x + gate2.unsqueeze(1) * self.mlp(normed)
