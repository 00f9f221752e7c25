"""The network over the whole registry of heads and presets."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixeldip import DiP, UserError
from pixeldip.model import HEADS, PLACEMENTS, PRESETS
from pixeldip.model.heads.unet import UNetHead, convolved_as_product
from pixeldip.model.layers import RMSNorm, untouched

from .conftest import opened_up

SIZES = {"hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def tiny(head: str = "unet", patch_size: int = 8, **changes) -> DiP:
    width = {} if head == "linear" else {"head_width": 16 if head == "attention" else 8}
    torch.manual_seed(0)
    return DiP(**{**SIZES, **width, "head": head, "patch_size": patch_size, **changes})


DESIGNS = [(head, placement) for head in HEADS for placement in PLACEMENTS if head != "linear"]
DESIGNS += [("linear", "post")]


def inputs(height: int = 16, width: int = 24, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch) + 3


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
@pytest.mark.parametrize("patch_size", [4, 5, 8, 14])
def test_any_multiple_of_the_patch(head: str, placement: str, patch_size: int) -> None:
    x, t, y = inputs(2 * patch_size, 3 * patch_size)
    v = tiny(head, patch_size, placement=placement)(x, t, y)
    assert v.shape == x.shape and v.isfinite().all()


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
@pytest.mark.parametrize("patch_size", [7, 8])
def test_a_gradient_reaches_every_parameter(head: str, placement: str, patch_size: int) -> None:
    model = opened_up(tiny(head, patch_size, placement=placement))
    model(*inputs(2 * patch_size, 3 * patch_size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.grad.stride() == parameter.stride(), name  # or DistributedDataParallel warns


@pytest.mark.parametrize("head", HEADS)
def test_a_gradient_reaches_the_whole_head_from_the_first_step(head: str) -> None:
    model = tiny(head)
    model(*inputs()).square().sum().backward()
    for name, parameter in model.detailer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert 0.2 < model.backbone.class_embed.weight.std() < 0.3


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
def test_starts_closed_and_small(head: str, placement: str) -> None:
    model = tiny(head, placement=placement)
    x, t, y = inputs()
    first = model(x, t, y)
    assert first.std() < 0.05 * x.std()
    # with all gates closed the blocks are the identity: their weights cannot change the output
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.mlp.down.weight.mul_(5)
            block.attention.out.weight.mul_(5)
    assert torch.equal(model(x, t, y), first)


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
def test_save_and_load(head: str, placement: str, tmp_path: Path) -> None:
    model = opened_up(tiny(head, placement=placement)).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = DiP.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert (again.config["head"], again.config["placement"]) == (head, placement)
    assert torch.equal(again(*inputs()), model(*inputs()))
    again, info = DiP.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(again(*inputs()), model(*inputs())) and not info["missing_keys"]


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_kept_in_fewer_bits(head: str, placement: str, storage: torch.dtype) -> None:
    model = opened_up(tiny(head, placement=placement)).eval()
    plain = model(*inputs())
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert model.backbone.blocks[0].mlp.up.weight.dtype == storage
    assert 0 < (model(*inputs()) - plain).abs().max() < 0.1 * plain.abs().max()


def test_sizes_of_numpy_are_saved_so_that_they_load_again(tmp_path: Path) -> None:
    model = tiny(depth=np.int64(1), head_depth=torch.tensor(2), mlp_ratio=np.float32(2))
    model.save_pretrained(tmp_path)
    again = DiP.from_pretrained(tmp_path)
    assert (again.config.depth, again.config.head_depth, again.config.mlp_ratio) == (1, 2, 2.0)
    assert torch.equal(again(*inputs()), model(*inputs()))


def test_only_absolute_positions_tell_equal_patches_apart(tmp_path: Path) -> None:
    x, t, y = inputs(24, 40)
    x = x[:, :, :8, :8].repeat(1, 1, 3, 5)  # every patch the same, as all are in expectation at t = 0

    def patches(model: DiP) -> torch.Tensor:
        return model(x, t, y).unflatten(-1, (5, 8)).unflatten(-3, (3, 8)).transpose(-2, -3)

    rotary, absolute = (opened_up(tiny(absolute_positions=told)).eval() for told in (False, True))
    for model, apart in ((rotary, False), (absolute, True)):
        v = patches(model).flatten(2, 3)
        for other in range(1, v.shape[2]):
            assert (not torch.allclose(v[:, :, 0], v[:, :, other], atol=1e-4)) == apart
    absolute.save_pretrained(tmp_path)
    again = DiP.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert torch.equal(patches(again), patches(absolute))
    names = [{name for name, _ in model.named_parameters()} for model in (rotary, absolute)]
    assert names[0] == names[1]  # so that trained weights can go on with or without them


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
def test_gradient_checkpointing_changes_nothing(head: str, placement: str) -> None:
    plain, saving = (opened_up(tiny(head, placement=placement)).train() for _ in range(2))
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing
    for model in (plain, saving):
        model(*inputs()).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        *((head, {}) for head in HEADS),
        ("unet", {"placement": "hybrid", "prediction": "noise"}),
        ("unet", {"patch_size": 6, "prediction": "image"}),
    ],
)
def test_compiles_to_the_same_function(head: str, changes: dict) -> None:
    torch.compiler.reset()
    model = opened_up(tiny(head, **changes))
    backend = "inductor" if head == "unet" else "aot_eager"  # which compiles in no time; the others are as plain inside
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    sizes = (2 * model.config.patch_size, 3 * model.config.patch_size)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(*sizes)), model(*inputs(*sizes)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("patch_size", [5, 8])
def test_the_head_sees_one_patch_at_a_time(head: str, patch_size: int) -> None:
    detailer = opened_up(tiny(head, patch_size)).detailer
    patch, context = torch.randn(6, 3, patch_size, patch_size), torch.randn(6, 32)
    before = detailer(patch, context)
    patch[2] += 1
    changed = (detailer(patch, context) - before).abs().amax((1, 2, 3)) > 1e-6
    assert changed.tolist() == [False, False, head != "linear", False, False, False]


@pytest.mark.parametrize(("head", "placement"), DESIGNS)
@pytest.mark.parametrize("prediction", ["velocity", "noise"])
@torch.no_grad()
def test_several_labels_of_an_image_are_several_calls(head: str, placement: str, prediction: str) -> None:
    model = opened_up(tiny(head, placement=placement, prediction=prediction))
    x, t, y = inputs()
    labels = torch.stack([y, torch.full_like(y, 5), y - 1])
    one_by_one = torch.stack([model(x, t, row) for row in labels])
    torch.testing.assert_close(model(x, t, labels), one_by_one, rtol=1e-5, atol=1e-5 * one_by_one.abs().max().item())
    v, tokens = model(x, t, labels, tokens_after=1)
    assert v.shape == (3, *x.shape) and tokens.shape == (9, 6, 32)


def plain_unet(head: nn.Module, patch: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The U-Net as the paper draws it: every layer by itself."""
    h, skips = patch, []
    for down in head.down:
        skips.append(F.silu(down(h)))
        h = F.max_pool2d(skips[-1], 2, ceil_mode=True)
    h = F.silu(head.bottleneck(torch.cat([h, context[..., None, None].expand(-1, -1, *h.shape[-2:])], dim=1)))
    for up, merge, skip in zip(reversed(head.up), reversed(head.merge), reversed(skips)):
        height, width = skip.shape[-2:]
        h = F.silu(merge(torch.cat([up(h)[..., :height, :width], skip], dim=1)))
    return head.out(h)


@pytest.mark.parametrize(("patch_size", "depth"), [(4, None), (16, None), (8, 2), (32, None), (5, None), (14, 2)])
def test_composed_convolutions_are_the_plain_ones(patch_size: int, depth: int | None) -> None:
    head = UNetHead(3, patch_size, 16, width=8, depth=depth)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    patch, context = torch.randn(6, 3, patch_size, patch_size), torch.randn(6, 16)
    plain = plain_unet(head, patch, context)
    wanted = torch.autograd.grad(plain.square().sum(), list(head.parameters()))
    made = head(patch, context)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    for gradient, plain_gradient in zip(torch.autograd.grad(made.square().sum(), list(head.parameters())), wanted):
        torch.testing.assert_close(gradient, plain_gradient, rtol=1e-3, atol=1e-4 * plain_gradient.abs().max().item())
    with torch.no_grad():
        kept = head.eval()(patch, context)
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


KEPT_OF_8_PIXELS = {("down", 2), ("up", 0, 4), ("up", 1, 2), ("up", 2, 1)}


def test_a_convolution_as_a_product_is_the_plain_one() -> None:
    head = UNetHead(3, 8, 16, width=12).double()
    for layer in head.down[0], head.down[1], head.out:  # 3 to 12, 12 to 24, 12 to 3
        h = torch.randn(5, layer.in_channels, 8, 8, dtype=torch.float64).requires_grad_()
        plain, product = layer(h), convolved_as_product(layer, h)
        grad = torch.randn_like(plain)
        torch.testing.assert_close(product, plain)
        for got, wanted in zip(*(torch.autograd.grad(y, [h, *layer.parameters()], grad) for y in (product, plain))):
            torch.testing.assert_close(got, wanted)


def test_kept_kernels_follow_the_weights() -> None:
    """Kernels are kept between calls without gradients, until a weight changes in place or moves."""
    head = UNetHead(3, 8, 16, width=8).eval()
    patch, context = torch.randn(6, 3, 8, 8), torch.randn(6, 16)

    def check(tolerance: float = 1e-5) -> None:
        with torch.no_grad():
            made, plain = head(patch, context), plain_unet(head, patch, context)
        torch.testing.assert_close(made, plain, rtol=0, atol=tolerance * plain.abs().max().item())

    check()

    class Shared(dict):
        """Which another thread's call clears whenever something is put into it."""

        def __setitem__(self, name: tuple, value: tuple) -> None:
            super().__setitem__(name, value)
            self.clear()

    mine, head.kept_kernels = head.kept_kernels, Shared()
    check()
    head.kept_kernels = mine
    kept = {i: composed for i, (_, composed) in head.kept_kernels.items()}
    check()
    assert kept.keys() == KEPT_OF_8_PIXELS and all(head.kept_kernels[i][1] is composed for i, composed in kept.items())
    head.load_state_dict(UNetHead(3, 8, 16, width=8).state_dict(), assign=True)  # elsewhere, and as often written to
    check()
    optimizer = torch.optim.AdamW(head.train().parameters(), lr=0.1, fused=True)
    head(patch, context).square().sum().backward()
    check()
    optimizer.step()
    check()
    head.eval()
    check()
    head.load_state_dict(UNetHead(3, 8, 16, width=8).state_dict())
    check()
    with torch.autocast("cpu", torch.bfloat16):
        check(0.02)
    check()
    head.to(torch.bfloat16)
    patch, context = patch.bfloat16(), context.bfloat16()
    check(0.02)


def test_a_compiled_head_keeps_its_kernels_and_learns() -> None:
    torch.compiler.reset()
    plain = UNetHead(3, 8, 16, width=8)
    compiled = copy.deepcopy(plain)
    compiled.compile(fullgraph=True, backend="aot_eager")
    patch, context = torch.randn(6, 3, 8, 8), torch.randn(2, 6, 16)
    for head in (plain, compiled):
        head(patch, context).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(patch, context), plain.eval()(patch, context))
    assert compiled.kept_kernels.keys() == KEPT_OF_8_PIXELS
    twin = copy.deepcopy(compiled)
    nn.init.zeros_(twin.out.weight)
    assert not twin(patch, context).any() and compiled(patch, context).any()


def test_norms_that_kernels_may_replace() -> None:
    """Not one of another kind, such as an adapter around the norm, or with a hook."""
    ours, hooked, hooked_before, replaced = (RMSNorm(8) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    hooked_before.register_forward_pre_hook(lambda *_: None)
    replaced.forward = lambda x: x  # as diffusers offloads
    others = hooked, hooked_before, replaced, nn.LayerNorm(8), nn.Sequential(RMSNorm(8))
    assert untouched([ours, ours], RMSNorm) and not any(untouched([ours, norm], RMSNorm) for norm in others)


@torch.no_grad()
def test_wrapped_and_hooked_layers_are_called() -> None:
    """Adapters, hooks and offloading work through a layer's own call."""
    head = UNetHead(3, 8, 16, width=8).eval()
    patch, context = torch.randn(6, 3, 8, 8), torch.randn(2, 6, 16)
    plain = head(patch, context)

    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    for name in ("down.2", "merge.0", "merge.2", "bottleneck"):
        layer = head.get_submodule(name)
        layer.__class__ = Doubled
        wrapped = head(patch, context)
        expected = torch.stack([plain_unet(head, patch, c) for c in context])
        assert (wrapped - plain).abs().max() > 1e-3, name
        torch.testing.assert_close(wrapped, expected, rtol=1e-4, atol=1e-5)
        layer.__class__ = nn.Conv2d
    called = []
    head.up[1].register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(head(patch, context), plain, rtol=1e-4, atol=1e-5)
    assert called


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
    torch.testing.assert_close(image(x, at_data, y), (velocity(x, at_data, y) - x) / 1e-3)


def test_bf16_weights_and_input_dtype() -> None:
    model = opened_up(tiny())
    x, t, y = inputs()
    half = model.to(torch.bfloat16)(x, t, y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.to(torch.float32)(x, t, y), rtol=0.1, atol=0.1)


def test_predicted_noise_is_eq_1s() -> None:
    """A network that predicts the noise it was given moves x_t along the straight path to the image."""
    model = tiny(prediction="noise")
    seen = {}

    class ItsNoise(nn.Module):
        def forward(self, patch: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            seen["patch"] = patch
            return noise.unflatten(-1, (3, 8)).unflatten(-3, (2, 8)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    model.detailer = ItsNoise()
    image, noise = torch.randn(2, 3, 3, 16, 24, generator=torch.Generator().manual_seed(2)).unbind(0)
    t = torch.tensor([0.01, 0.4, 0.97])
    weight = t.view(-1, 1, 1, 1)
    x_t = weight * image + (1 - weight) * noise
    v = model(x_t, t, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(v, image - noise, rtol=1e-4, atol=2e-5)
    eq_1 = x_t / (weight**2 + (1 - weight) ** 2).sqrt()  # sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise
    torch.testing.assert_close(seen["patch"][0], eq_1[0, :, :8, :8])


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_tokens_after_a_block(blocks: int) -> None:
    model = opened_up(tiny(depth=4, placement="hybrid"))
    caught = []
    model.backbone.blocks[blocks - 1].register_forward_hook(lambda module, args, output: caught.append(output))
    v, tokens = model(*inputs(), tokens_after=blocks)
    assert tokens is caught[0] and tokens.shape == (3, 6, 32)
    assert torch.equal(v, model(*inputs()))


@pytest.mark.parametrize(
    ("placement", "heads"), [("post", [False, True]), ("intermediate", [True, False]), ("hybrid", [True, True])]
)
def test_where_the_head_stands(placement: str, heads: list[bool]) -> None:
    model = tiny(placement=placement, depth=5)
    stands = [type(m).__name__ == "UNetHead" for m in (getattr(model.injection, "detailer", None), model.detailer)]
    assert stands == heads
    order = []
    watched = {"head": model.detailer} | ({"injected": model.injection.project} if model.injection else {})
    for name, module in [*watched.items(), *((f"block {i}", b) for i, b in enumerate(model.backbone.blocks))]:
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(*inputs())
    injected = ["injected"] if model.injection else []
    assert order == ["block 0", "block 1", *injected, "block 2", "block 3", "block 4", "head"]


# The release's and PixNerd's; of the others, whose sizes the paper leaves open, as docs/how-it-works.md tells them
@pytest.mark.parametrize(
    ("head", "count"),
    [
        *(("unet", 631_989_411), ("linear", 628_563_360), ("coordinate_mlp", 700_589_219)),
        *(("attention", 626_993_955), ("mlp", 629_448_096)),
    ],
)
def test_parameters_of_the_heads(head: str, count: int) -> None:
    with torch.device("meta"):
        assert DiP.from_preset("dip-xl/16", head=head).num_parameters() == count


@pytest.mark.parametrize("name", PRESETS)
def test_preset_parameters(name: str) -> None:
    with torch.device("meta"):
        assert DiP.from_preset(name).num_parameters() == PRESETS[name].parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "multiple of 4 \\* num_heads"),
        ({"head": "unett"}, "choose one of unet, coordinate_mlp, attention, mlp, linear"),
        ({"head_depth": 4}, "can be halved 3 times"),
        ({"head_depth": 3, "patch_size": 4}, "can be halved 2 times"),
        ({"head": "attention"}, "multiple of 16"),
        ({"depth": 0}, "depth=0"),
        ({"prediction": "images"}, "choose one of velocity, image, noise"),
        ({"placement": "pre"}, "choose one of post, intermediate, hybrid"),
        ({"placement": "hybrid", "depth": 1}, "at least 2"),
        ({"placement": "hybrid", "head": "linear", "head_width": None}, "no head to place"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"head": "linear"}, "mean nothing to head='linear'"),
        ({"hidden_size": "32"}, "hidden_size '32': give a whole number"),
        ({"num_classes": None}, "num_classes None: give a whole number"),
        ({"head_width": 8.0}, r"head_width 8\.0: give a whole number"),
        ({"head_width": 0}, "head_width=0: must be at least 1"),
        ({"mlp_ratio": "4"}, "mlp_ratio '4': give a finite number"),
        ({"mlp_ratio": 0}, r"mlp_ratio=0\.0: must be above 0"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio=0\.01: blocks \d+ wide would have MLPs of no width"),
        ({"absolute_positions": "no"}, "absolute_positions='no': give True or False"),
        ({"head": ["unet"]}, "choose one of unet"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiP(**{**SIZES, "patch_size": 8, "head_width": 8, **changes})


def test_an_image_that_cannot_be_cut() -> None:
    with pytest.raises(UserError, match=r"16x20 pixels .* multiples of 8"):
        tiny()(*inputs(16, 20))


@pytest.mark.parametrize(
    ("t", "y", "message"),
    [
        ((1,), (3,), r"t \(1,\): give a time for each image, \(3,\)"),
        ((), (3,), r"t \(\): give a time"),
        ((3,), (1,), r"y \(1,\): give a label for each image, \(3,\), or several, \(G, 3\)"),
        ((3,), (), r"y \(\): give a label"),
        ((3,), (2, 1), r"y \(2, 1\): give a label"),
    ],
)
def test_a_time_and_a_label_for_each_image(t: tuple, y: tuple, message: str) -> None:
    """A single one would be taken for all."""
    with pytest.raises(UserError, match=message):
        tiny()(torch.zeros(3, 3, 16, 24), torch.zeros(t), torch.zeros(y, dtype=torch.long))


def test_images_of_other_channels() -> None:
    for x in (torch.zeros(3, 16, 24), torch.zeros(2, 4, 16, 24)):
        with pytest.raises(UserError, match=r"give images \(B, 3, H, W\)"):
            tiny()(x, torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_an_unknown_preset_gets_a_hint() -> None:
    with pytest.raises(UserError, match="perhaps dip-xl/16"):
        DiP.from_preset("dip-xl-16")
