"""On a CUDA device a block computes by Triton kernels what its plain code does, gradients included."""

import pytest
import torch
from torch import Tensor

from pixeldip.model import layers
from pixeldip.model.layers import Block, rope_2d

pytestmark = pytest.mark.skipif(layers.kernels is None or not torch.cuda.is_available(), reason="wants CUDA, Triton")


def opened(width: int, heads: int) -> Block:
    block = Block(width, heads, 4.0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block.cuda()


def results(block: Block, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    x, c = x.clone().requires_grad_(), c.clone().requires_grad_()
    block.zero_grad()
    y = block(x, c, rope)
    y.backward(grad)
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "c": c.grad, **gradients}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "rows", "columns", "width", "heads"), [(3, 5, 7, 72, 3), (2, 16, 16, 1152, 16)])
def test_a_block_is_its_plain_code(
    compiled: bool,
    precision: torch.dtype,
    batch: int,
    rows: int,
    columns: int,
    width: int,
    heads: int,
) -> None:
    block = opened(width, heads)
    x, grad = (torch.randn(batch, rows * columns, width, device="cuda") for _ in range(2))
    given = x, torch.randn(batch, width, device="cuda"), rope_2d(rows, columns, width // heads, x.device), grad
    plain, inferred = results(block, *given), block(*given[:3]).detach()
    block.fused = block.attention.fused = True
    if compiled:
        torch.compiler.reset()
        block.compile(dynamic=False)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        fused = results(block, *(t.to(precision) if t is x else t for t in given))
        with torch.no_grad():
            y = block(x.to(precision), *given[1:3])
    bound = 3e-4 if precision == torch.float32 else 0.03
    for name, wanted in plain.items():
        assert (fused[name] - wanted).norm() < bound * wanted.norm(), name
    assert (y - inferred).norm() < bound * inferred.norm()
