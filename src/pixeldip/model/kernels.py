"""Triton kernels for code compiled for CUDA devices, where inductor's own take several times as long as reading and
writing does.

Each is what the plain code in `layers` computes, in float32 inside, with its gradient, compiled anew for each shape.
benchmarks/LOG.md has what they save. B batch, N patches, h heads, d channels of one, D hidden size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton


class Launch(NamedTuple):
    """How a kernel is launched."""

    warps: int
    programs: int = 0
    """That share the tokens, about, each a part of them."""
    values: int = 0
    """That a program holds of a tensor at a time, about."""


ROTATION, ROTATION_BACKWARD = Launch(4), Launch(4, 1056)
NORM, NORM_BACKWARD = Launch(2, 4224, 2048), Launch(8, 1056, 4096)
"""The fastest of those tried on an H200, with DiP-XL's sizes and 256 images."""


@triton.jit
def _rotated(y, cos, sin, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Turns the channel pairs of y (ROWS, WIDTH) by cos and sin (WIDTH / 2)."""
    a, b = tl.split(tl.reshape(y, (ROWS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, WIDTH))


@triton.jit
def _queries_and_keys(
    qkv, q_weight, k_weight, cos, sin, q, k, v,
    patches, heads: tl.constexpr, size: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WITH_V: tl.constexpr,
):  # fmt: skip
    """One token: its queries and keys normed, weighted and rotated; with WITH_V its values as they are."""
    token = tl.program_id(0).to(tl.int64)
    channel, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    angle, known = (token % patches) * size + 2 * pair, 2 * pair < size
    c = tl.load(cos + angle, mask=known, other=0.0)
    s = tl.load(sin + angle + 1, mask=known, other=0.0)
    row = tl.arange(0, ROWS)[:, None]
    there = (row < heads) & (channel < size)[None, :]
    place = row * size + channel[None, :]
    source, target = qkv + token * 3 * heads * size + place, token * heads * size + place
    raw_q = tl.load(source, mask=there, other=0.0)  # all loads stand before the first sum, which would hold them up
    raw_k = tl.load(source + heads * size, mask=there, other=0.0)
    if WITH_V:
        tl.store(v + target, tl.load(source + 2 * heads * size, mask=there, other=0.0), mask=there)
    for part in tl.static_range(2):
        x = (raw_q if part == 0 else raw_k).to(tl.float32)
        weight = tl.load((q_weight if part == 0 else k_weight) + channel, mask=channel < size, other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)
        y = _rotated(x * scale[:, None] * weight.to(tl.float32)[None, :], c[None, :], s[None, :], ROWS, WIDTH)
        tl.store((q if part == 0 else k) + target, y, mask=there)


@triton.jit
def _queries_and_keys_backward(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, dweights,
    tokens, patches, heads: tl.constexpr, size: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Every so-manyth token: gradient of qkv, and of the weights summed over them, (programs, 2, d)."""
    program = tl.program_id(0)
    channel, pair = tl.arange(0, WIDTH), tl.arange(0, WIDTH // 2)
    within, known = channel < size, 2 * pair < size
    row = tl.arange(0, ROWS)[:, None]
    there = (row < heads) & within[None, :]
    place = row * size + channel[None, :]
    q_scale = tl.load(q_weight + channel, mask=within, other=0.0).to(tl.float32)[None, :]
    k_scale = tl.load(k_weight + channel, mask=within, other=0.0).to(tl.float32)[None, :]
    q_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    k_sum = tl.zeros((ROWS, WIDTH), tl.float32)
    programs = tl.num_programs(0)
    for turn in range(tl.cdiv(tokens - program, programs)):
        token = (program + turn * programs).to(tl.int64)
        angle = (token % patches) * size + 2 * pair
        c = tl.load(cos + angle, mask=known, other=0.0)[None, :]
        s = tl.load(sin + angle + 1, mask=known, other=0.0)[None, :]
        given, whole = token * heads * size + place, token * 3 * heads * size + place
        raw_q = tl.load(qkv + whole, mask=there, other=0.0)
        raw_k = tl.load(qkv + whole + heads * size, mask=there, other=0.0)
        given_q = tl.load(dq + given, mask=there, other=0.0)
        given_k = tl.load(dk + given, mask=there, other=0.0)
        tl.store(dqkv + whole + 2 * heads * size, tl.load(dv + given, mask=there, other=0.0), mask=there)
        for part in tl.static_range(2):
            x = (raw_q if part == 0 else raw_k).to(tl.float32)
            dy = _rotated((given_q if part == 0 else given_k).to(tl.float32), c, -s, ROWS, WIDTH)
            scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
            normed = x * scale
            if part == 0:
                q_sum += dy * normed
                dy = dy * q_scale
            else:
                k_sum += dy * normed
                dy = dy * k_scale
            dx = scale * (dy - normed * (tl.sum(dy * normed, 1) / size)[:, None])
            tl.store(dqkv + whole + part * heads * size, dx, mask=there)
    tl.store(dweights + 2 * program * size + channel, tl.sum(q_sum, 0), mask=within)
    tl.store(dweights + (2 * program + 1) * size + channel, tl.sum(k_sum, 0), mask=within)


def _head_shape(heads: int, size: int, launch: Launch) -> dict[str, int]:
    rows, width = triton.next_power_of_2(heads), triton.next_power_of_2(size)
    return {"heads": heads, "size": size, "ROWS": rows, "WIDTH": width, "num_warps": launch.warps}


@triton_op("pixeldip::queries_keys_values", mutates_args={})
def _queries_keys_values(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, patches, _, heads, size = map(int, qkv.shape)
    q, k, v = (qkv.new_empty(batch, patches, heads, size) for _ in range(3))
    wrap_triton(_queries_and_keys)[(batch * patches,)](
        qkv, q_weight, k_weight, cos, sin, q, k, v, patches, eps=eps, WITH_V=True, **_head_shape(heads, size, ROTATION)
    )
    return q, k, v


@triton_op("pixeldip::queries_keys_values_backward", mutates_args={})
def _queries_keys_values_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, patches, _, heads, size = map(int, qkv.shape)
    tokens = batch * patches
    programs = min(tokens, ROTATION_BACKWARD.programs)
    dqkv = torch.empty_like(qkv)
    dweights = qkv.new_empty(programs, 2, size, dtype=torch.float32)
    wrap_triton(_queries_and_keys_backward)[(programs,)](
        dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, dweights, tokens, patches, eps=eps,
        **_head_shape(heads, size, ROTATION_BACKWARD),
    )  # fmt: skip
    return dqkv, dweights


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient_of_queries(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dqkv, dweights = _queries_keys_values_backward(
        dq.contiguous(), dk.contiguous(), dv.contiguous(), qkv, q_weight, k_weight, cos, sin, ctx.eps
    )
    dq_weight, dk_weight = dweights.sum(0)
    return dqkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None


_queries_keys_values.register_autograd(_gradient_of_queries, setup_context=_keep_inputs)


@triton_op("pixeldip::queries_keys", mutates_args={})
def _queries_keys(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    batch, patches, _, heads, size = map(int, qkv.shape)
    q, k = (qkv.new_empty(batch, patches, heads, size) for _ in range(2))
    wrap_triton(_queries_and_keys)[(batch * patches,)](
        qkv, q_weight, k_weight, cos, sin, q, k, q, patches, eps=eps, WITH_V=False, **_head_shape(heads, size, ROTATION)
    )
    return q, k


def queries_keys_values(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, RMS-normed and rotated, and values, each (B, N, h, d), of qkv (B, N, 3, h, d).

    Args:
        rope: as `layers.rope_2d` makes it.
    """
    qkv, (cos, sin) = qkv.contiguous(), rope
    if torch.is_grad_enabled() and (qkv.requires_grad or q_weight.requires_grad or k_weight.requires_grad):
        return _queries_keys_values(qkv, q_weight, k_weight, cos, sin, eps)  # a copy of the values, for one gradient
    return *_queries_keys(qkv, q_weight, k_weight, cos, sin, eps), qkv[:, :, 2]


@triton.jit
def _part_of(modulation, sample, part: tl.constexpr, size: tl.constexpr, channel):
    """One of the six (D,) that a sample's row of modulation consists of."""
    place = modulation + (sample * 6 + part) * size + channel
    return tl.load(place, mask=channel < size, other=0.0).to(tl.float32)


@triton.jit
def _norm_modulate(
    x, branch, modulation, weight, moved, out,
    patches, chunks, part, size: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WITH_BRANCH: tl.constexpr,
):  # fmt: skip
    """`part` tokens of one sample: with a branch x + gate branch; and that normed, weighted and modulated."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    within = channel < size
    w = tl.load(weight + channel, mask=within, other=0.0).to(tl.float32)
    shift = _part_of(modulation, sample, 3 if WITH_BRANCH else 0, size, channel)
    factor = w * (1 + _part_of(modulation, sample, 4 if WITH_BRANCH else 1, size, channel))
    if WITH_BRANCH:
        gate = _part_of(modulation, sample, 2, size, channel)
    first = (program % chunks) * part
    for start in range(first, tl.minimum(first + part, patches), ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < patches)[:, None] & within[None, :]
        place = (sample * patches + row)[:, None] * size + channel[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        if WITH_BRANCH:
            value += gate[None, :] * tl.load(branch + place, mask=there, other=0.0).to(tl.float32)
            tl.store(moved + place, value, mask=there)
        root = tl.rsqrt(tl.sum(value * value, 1) / size + eps)
        tl.store(out + place, value * root[:, None] * factor[None, :] + shift[None, :], mask=there)


@triton.jit
def _norm_modulate_backward(
    dout, dmoved, moved, branch, modulation, weight, dx, dbranch, sums,
    patches, chunks, part, size: tl.constexpr, eps: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, WITH_BRANCH: tl.constexpr,
):  # fmt: skip
    """`part` tokens of one sample: gradients of x and branch; and over the tokens, in `sums` (programs, 3, D), of the
    gate, of the shift, and of what is scaled, before its weight."""
    program = tl.program_id(0)
    sample = (program // chunks).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    within = channel < size
    w = tl.load(weight + channel, mask=within, other=0.0).to(tl.float32)
    factor = (w * (1 + _part_of(modulation, sample, 4 if WITH_BRANCH else 1, size, channel)))[None, :]
    if WITH_BRANCH:
        gate = _part_of(modulation, sample, 2, size, channel)[None, :]
    gated = tl.zeros((WIDTH,), tl.float32)
    shifted = tl.zeros((WIDTH,), tl.float32)
    scaled = tl.zeros((WIDTH,), tl.float32)
    first = (program % chunks) * part
    for start in range(first, tl.minimum(first + part, patches), ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < patches)[:, None] & within[None, :]
        place = (sample * patches + row)[:, None] * size + channel[None, :]
        value = tl.load(moved + place, mask=there, other=0.0).to(tl.float32)
        dy = tl.load(dout + place, mask=there, other=0.0).to(tl.float32)
        if WITH_BRANCH:
            added = tl.load(branch + place, mask=there, other=0.0).to(tl.float32)
            passed = tl.load(dmoved + place, mask=there, other=0.0).to(tl.float32)
        root = tl.rsqrt(tl.sum(value * value, 1) / size + eps)[:, None]
        normed = value * root
        shifted += tl.sum(dy, 0)
        scaled += tl.sum(dy * normed, 0)
        dy = dy * factor
        d = root * (dy - normed * (tl.sum(dy * normed, 1) / size)[:, None])
        if WITH_BRANCH:
            d += passed
            gated += tl.sum(d * added, 0)
            tl.store(dbranch + place, d * gate, mask=there)
        tl.store(dx + place, d, mask=there)
    target = sums + program.to(tl.int64) * 3 * size + channel
    tl.store(target, gated, mask=within)
    tl.store(target + size, shifted, mask=within)
    tl.store(target + 2 * size, scaled, mask=within)


def _token_shape(x: Tensor, launch: Launch) -> tuple[int, dict[str, int]]:
    """How many programs share a sample's tokens, and what else the kernels want to know of x (B, N, D)."""
    batch, patches, size = map(int, x.shape)
    width = triton.next_power_of_2(size)
    rows = max(1, min(launch.values // width, triton.next_power_of_2(patches)))
    part = rows * triton.cdiv(triton.cdiv(patches, max(1, launch.programs // batch)), rows)
    chunks = triton.cdiv(patches, part)
    return chunks, {
        "patches": patches, "chunks": chunks, "part": part, "size": size, "ROWS": rows, "WIDTH": width,
        "num_warps": launch.warps,
    }  # fmt: skip


def _gradients(sums: Tensor, modulation: Tensor, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Of modulation (B, 6 D) and weight (D,), from the sums (B, chunks, 3, D); `first` is the gate's place, or where it
    would be."""
    size = len(weight)
    gated, shifted, scaled = sums.sum(1).unbind(1)
    scale = modulation.unflatten(1, (6, size))[:, first + 2].float()
    parts = [shifted, scaled * weight.float()] if first < 0 else [gated, shifted, scaled * weight.float()]
    whole = F.pad(torch.cat(parts, 1), (max(first, 0) * size, (3 - first) * size))
    return whole.to(modulation.dtype), (scaled * (1 + scale)).sum(0).to(weight.dtype)


@triton_op("pixeldip::norm_modulate", mutates_args={})
def _norm_modulated(x: Tensor, modulation: Tensor, weight: Tensor, eps: float) -> Tensor:
    chunks, shape = _token_shape(x, NORM)
    out = torch.empty_like(x)
    wrap_triton(_norm_modulate)[(len(x) * chunks,)](
        x, x, modulation, weight, out, out, eps=eps, WITH_BRANCH=False, **shape
    )
    return out


@triton_op("pixeldip::norm_modulate_backward", mutates_args={})
def _norm_modulated_backward(
    dout: Tensor, x: Tensor, modulation: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    chunks, shape = _token_shape(x, NORM_BACKWARD)
    dx, sums = torch.empty_like(x), x.new_empty(len(x), chunks, 3, x.shape[-1], dtype=torch.float32)
    wrap_triton(_norm_modulate_backward)[(len(x) * chunks,)](
        dout, dout, x, x, modulation, weight, dx, dx, sums, eps=eps, WITH_BRANCH=False, **shape
    )
    return dx, sums


def _gradient_of_norm(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, modulation, weight = ctx.saved_tensors
    dx, sums = _norm_modulated_backward(dout.contiguous(), x, modulation, weight, ctx.eps)
    return dx, *_gradients(sums, modulation, weight, -1), None


_norm_modulated.register_autograd(_gradient_of_norm, setup_context=_keep_inputs)


@triton_op("pixeldip::add_norm_modulate", mutates_args={})
def _add_norm_modulated(
    x: Tensor, branch: Tensor, modulation: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    chunks, shape = _token_shape(x, NORM)
    moved, out = torch.empty_like(x), torch.empty_like(x)
    wrap_triton(_norm_modulate)[(len(x) * chunks,)](
        x, branch, modulation, weight, moved, out, eps=eps, WITH_BRANCH=True, **shape
    )
    return moved, out


@triton_op("pixeldip::add_norm_modulate_backward", mutates_args={})
def _add_norm_modulated_backward(
    dmoved: Tensor, dout: Tensor, moved: Tensor, branch: Tensor, modulation: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    chunks, shape = _token_shape(moved, NORM_BACKWARD)
    dx, dbranch = torch.empty_like(moved), torch.empty_like(branch)
    sums = moved.new_empty(len(moved), chunks, 3, moved.shape[-1], dtype=torch.float32)
    wrap_triton(_norm_modulate_backward)[(len(moved) * chunks,)](
        dout, dmoved, moved, branch, modulation, weight, dx, dbranch, sums, eps=eps, WITH_BRANCH=True, **shape
    )
    return dx, dbranch, sums


def _keep_for_add_norm(ctx, inputs, output) -> None:
    _, *tensors, ctx.eps = inputs
    ctx.save_for_backward(output[0], *tensors)


def _gradient_of_add_norm(ctx, dmoved: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    moved, branch, modulation, weight = ctx.saved_tensors
    dx, dbranch, sums = _add_norm_modulated_backward(
        dmoved.contiguous(), dout.contiguous(), moved, branch, modulation, weight, ctx.eps
    )
    return dx, dbranch, *_gradients(sums, modulation, weight, 2), None


_add_norm_modulated.register_autograd(_gradient_of_add_norm, setup_context=_keep_for_add_norm)


def norm_modulate(x: Tensor, modulation: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (B, N, D), RMS-normed, times weight (D,), moved and scaled by the first two of the six parts of modulation
    (B, 6 D)."""
    return _norm_modulated(x.contiguous(), modulation.contiguous(), weight, eps)


def add_norm_modulate(
    x: Tensor, branch: Tensor, modulation: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate branch, both (B, N, D), by the third part of modulation (B, 6 D); and that normed, weighted, moved and
    scaled by the fourth and fifth."""
    return _add_norm_modulated(x.contiguous(), branch.contiguous(), modulation.contiguous(), weight, eps)
