"""Compiled for a CUDA device, a block and a head compute by other kernels what their plain code does, gradients
included. Without such a device Triton's interpreter runs its kernels."""

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pixeldip.model import layers
from pixeldip.model.heads.unet import UNetHead
from pixeldip.model.layers import Block, rope_2d
from pixeldip.processes import exact_matmuls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_cuda = pytest.mark.skipif(layers.kernels is None or DEVICE == "cpu", reason="wants CUDA and Triton")


def opened(width: int, heads: int) -> Block:
    block = Block(width, heads, 4.0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block.to(DEVICE)


def results(block: Block, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    x, c = x.clone().requires_grad_(), c.clone().requires_grad_()
    block.zero_grad()
    y = block(x, c, rope)
    y.backward(grad)
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "c": c.grad, **gradients}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("batch", "rows", "columns", "width", "heads"), [(3, 5, 7, 72, 3), (2, 1, 2, 32, 1)])
def test_kernels_are_the_plain_code(
    batch: int, rows: int, columns: int, width: int, heads: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", "3.7.1" if DEVICE == "cpu" else None)  # older ones' interpreter wants an older NumPy
    from pixeldip.model import kernels

    monkeypatch.setattr(layers, "kernels", kernels)
    if shared:  # each program takes several tokens, as in large batches
        for name in ("ROTATION_BACKWARD", "NORM", "NORM_BACKWARD"):
            monkeypatch.setattr(kernels, name, kernels.Launch(4, programs=2 * batch, values=512))
    block = opened(width, heads)
    x, grad = (torch.randn(batch, rows * columns, width, device=DEVICE) for _ in range(2))
    given = x, torch.randn(batch, width, device=DEVICE), rope_2d(rows, columns, width // heads, x.device), grad
    with exact_matmuls():
        plain = results(block, *given)
        monkeypatch.setattr(layers, "by_kernels", lambda *_: True)
        ours = results(block, *given)
        with torch.no_grad():
            inferred = block(*given[:3])
    assert ours.keys() == plain.keys()
    for name, wanted in plain.items():
        assert (ours[name] - wanted).norm() <= 1e-5 * wanted.norm(), name
    assert (inferred - plain["y"]).norm() < 1e-5 * plain["y"].norm()


@on_cuda
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "rows", "columns", "width", "heads"), [(3, 5, 7, 72, 3), (2, 16, 16, 1152, 16)])
def test_a_compiled_block_is_its_plain_code(
    precision: torch.dtype, batch: int, rows: int, columns: int, width: int, heads: int
) -> None:
    block = opened(width, heads)
    x, grad = (torch.randn(batch, rows * columns, width, device="cuda") for _ in range(2))
    given = x, torch.randn(batch, width, device="cuda"), rope_2d(rows, columns, width // heads, x.device), grad
    plain, inferred = results(block, *given), block(*given[:3]).detach()
    torch.compiler.reset()
    block.compile(dynamic=False)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            compiled = results(block, *(t.to(precision) if t is x else t for t in given))
        with torch.no_grad():
            y = block(x.to(precision), *given[1:3])
    names = {event.key for event in profiler.key_averages()}
    assert {"_norm_modulate", "_norm_modulate_backward", "_queries_and_keys", "_queries_and_keys_backward"} <= names
    bound = 3e-4 if precision == torch.float32 else 0.03
    for name, wanted in plain.items():
        assert (compiled[name] - wanted).norm() < bound * wanted.norm(), name
    assert (y - inferred).norm() < bound * inferred.norm()


@on_cuda
def test_a_compiled_block_in_bf16_is_its_plain_code() -> None:
    block = opened(1152, 16)
    x, c = torch.randn(2, 256, 1152, device="cuda"), torch.randn(2, 1152, device="cuda")
    rope = rope_2d(16, 16, 72, x.device)
    with torch.no_grad():
        plain = block(x, c, rope)
        torch.compiler.reset()
        block.bfloat16().compile(dynamic=False)
        assert (block(x.bfloat16(), c.bfloat16(), rope) - plain).norm() < 0.03 * plain.norm()


@on_cuda
def test_a_compiled_head_is_its_plain_code() -> None:
    head = UNetHead(3, 16, 64).cuda()
    nn.init.normal_(head.out.weight)
    patch, context = torch.randn(8, 3, 16, 16, device="cuda"), torch.randn(2, 8, 64, device="cuda")

    def results() -> list[Tensor]:
        y = head(patch, context)
        return [y, *torch.autograd.grad(y.square().sum(), list(head.parameters()))]

    with exact_matmuls():
        plain = results()
        torch.compiler.reset()
        head.compile(dynamic=False)
        for compiled, wanted in zip(results(), plain):
            assert (compiled - wanted).norm() < 1e-4 * wanted.norm()
