"""The network over the whole registry of heads and presets."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pixeldip import DiP, UserError
from pixeldip.model import HEADS, PRESETS

from .conftest import opened_up

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(head: str = "unet", patch_size: int = 8, **changes) -> DiP:
    width = {"head_width": 8} if head != "linear" else {}
    torch.manual_seed(0)
    return DiP(**{**SIZES, **width, "head": head, "patch_size": patch_size, **changes})


def inputs(height: int = 16, width: int = 24, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) + 3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("patch_size", [4, 8, 12])
def test_any_multiple_of_the_patch(head: str, patch_size: int) -> None:
    x, t, y = inputs(2 * patch_size, 3 * patch_size)
    assert tiny(head, patch_size)(x, t, y).shape == x.shape


@pytest.mark.parametrize("head", HEADS)
def test_a_gradient_reaches_every_parameter(head: str) -> None:
    model = opened_up(tiny(head))
    model(*inputs()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("head", HEADS)
def test_starts_closed_and_small(head: str) -> None:
    model = tiny(head)
    x, t, y = inputs()
    first = model(x, t, y)
    assert first.std() < 0.05 * x.std()
    # with all gates closed the blocks are the identity: their weights cannot change the output
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.mlp.down.weight.mul_(5)
            block.attention.out.weight.mul_(5)
    assert torch.equal(model(x, t, y), first)


@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(head: str, tmp_path: Path) -> None:
    model = opened_up(tiny(head)).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = DiP.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert dict(again.config)["head"] == head
    assert torch.equal(again(*inputs()), model(*inputs()))


@pytest.mark.parametrize("head", HEADS)
def test_gradient_checkpointing_changes_nothing(head: str) -> None:
    plain, saving = opened_up(tiny(head)).train(), opened_up(tiny(head)).train()
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing
    for model in (plain, saving):
        model(*inputs()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_compiles_to_the_same_function() -> None:
    model = opened_up(tiny())
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs()), model(*inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_the_head_sees_one_patch_at_a_time(head: str) -> None:
    detailer = opened_up(tiny(head)).detailer
    patch, context = torch.randn(6, 3, 8, 8), torch.randn(6, 32)
    before = detailer(patch, context)
    patch[2] += 1
    changed = (detailer(patch, context) - before).abs().amax((1, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, head != "linear", False, False, False]


def test_patches_come_back_to_their_place() -> None:
    model = tiny()

    class ItsPatch(nn.Module):
        def forward(self, patch: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return patch

    model.detailer = ItsPatch()
    x, t, y = inputs(24, 40)
    assert torch.equal(model(x, t, y), x)


def test_a_predicted_image_becomes_the_velocity_towards_it() -> None:
    velocity, image = opened_up(tiny()), opened_up(tiny(prediction="image"))
    x, t, y = inputs()
    torch.testing.assert_close(image(x, t, y), (velocity(x, t, y) - x) / (1 - t.view(-1, 1, 1, 1)))
    at_data = torch.ones(3)  # where 1 - t vanishes
    torch.testing.assert_close(image(x, at_data, y), (velocity(x, at_data, y) - x) / 0.05)


def test_bf16_weights_and_input_dtype() -> None:
    model = opened_up(tiny())
    x, t, y = inputs()
    half = model.to(torch.bfloat16)(x, t, y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.to(torch.float32)(x, t, y), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_parameters(name: str) -> None:
    with torch.device("meta"):
        assert DiP.from_preset(name).num_parameters() == PRESETS[name].parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "multiple of 4 \\* num_heads"),
        ({"head": "unett"}, "choose one of unet, linear"),
        ({"head_depth": 4}, "can be halved 3 times"),
        ({"patch_size": 7}, "odd"),
        ({"depth": 0}, "depth=0"),
        ({"prediction": "noise"}, "choose one of velocity, image"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"head": "linear"}, "do not apply to head='linear'"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiP(**{**SIZES, "patch_size": 8, "head_width": 8, **changes})


def test_an_image_that_cannot_be_cut() -> None:
    with pytest.raises(UserError, match=r"16x20 pixels .* multiples of 8"):
        tiny()(*inputs(16, 20))


def test_an_unknown_preset_gets_a_hint() -> None:
    with pytest.raises(UserError, match="perhaps dip-xl/16"):
        DiP.from_preset("dip-xl-16")
