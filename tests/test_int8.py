"""Products of 8-bit integers: near those in floating point, for inference, and refused where they cannot be."""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.bench.contenders import Contender, Int8Part
from pixeldip.bench.steps import replayed, sampling_contender
from pixeldip.bench.timing import Ceilings
from pixeldip.cli import main
from pixeldip.images import psnr
from pixeldip.model import Int8Linear
from pixeldip.processes import choose_precision

from .conftest import TINY_MODEL, opened_up

pytestmark = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="needs a CPU with AVX512-VNNI")
EMOJI = Path(__file__).parent.parent / "models" / "emoji64"
LAYERS = {"attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down"}


def open_model(**changes: Any) -> DiP:
    return opened_up(DiP(**{**TINY_MODEL, "num_classes": 3, **changes})).eval().requires_grad_(False)


def in_int8(model: DiP) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "rotated"), [(64, False), (64, True), (30, True), (150, True)])
@torch.no_grad()
def test_a_layer_is_near_the_one_it_was_made_of(rows: int, bias: bool, width: int, rotated: bool) -> None:
    linear = nn.Linear(width, 48, bias=bias)
    linear.weight[3] = 0
    linear.weight[5] *= 100  # an output's scale is its own, and so is a token's
    x = torch.randn(2, rows, width) * torch.logspace(-3, 3, rows)[:, None]
    x[0, 0] = 0
    expected, found = linear(x), Int8Linear(linear, rotated)(x)
    assert found.shape == expected.shape and found.dtype == x.dtype
    sizes = x.norm(dim=-1, keepdim=True) * linear.weight.norm(dim=-1)
    assert ((found - expected).abs() <= 0.01 * sizes).all()
    half = x.bfloat16()
    assert Int8Linear(linear.bfloat16(), rotated)(half).dtype == torch.bfloat16


@torch.no_grad()
def test_rotation_takes_outliers_in() -> None:
    linear = nn.Linear(256, 48, bias=False)
    x = torch.randn(100, 256)
    x[torch.arange(100), torch.randint(256, (100,))] = 40  # elsewhere in each token
    errors = {rotated: (Int8Linear(linear, rotated)(x) - linear(x)).std() for rotated in (False, True)}
    assert errors[True] < 0.4 * errors[False]


@pytest.mark.parametrize("rotated", [False, True])
@torch.no_grad()
def test_what_is_not_finite_stays_so(rotated: bool) -> None:
    layer = Int8Linear(nn.Linear(8, 8), rotated)
    for value in (float("nan"), float("inf")):
        x = torch.zeros(20, 8)
        x[3, 1] = value
        finite = layer(x).isfinite().all(1)
        assert not finite[3] and finite[:3].all() and finite[4:].all()


@torch.no_grad()
def test_the_velocity_is_near_and_only_the_backbones_layers_change() -> None:
    model = open_model(head="attention", head_width=16, placement="hybrid")
    x, t, y = torch.randn(2, 3, 16, 24), torch.tensor([0.2, 0.7]), torch.tensor([[0, 1], [3, 3]])
    expected = model(x, t, y)
    model.quantize_to_int8()
    assert 0 < (model(x, t, y) - expected).std() < 0.03 * expected.std()
    assert in_int8(model) == {f"backbone.blocks.{i}.{name}" for i in range(model.config.depth) for name in LAYERS}


def test_casts_leave_the_integers_and_their_scale_alone() -> None:
    model = open_model()
    model.quantize_to_int8()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for cast in (model.bfloat16, lambda: model.type(torch.bfloat16), model.float):
        cast()
        assert all(torch.equal(buffer, kept[name]) for name, buffer in model.named_buffers())
        assert {buffer.dtype for buffer in model.buffers()} == {torch.int8, torch.float32}
    assert len(kept) == (2 * len(LAYERS) + 1) * model.config.depth  # values and scales, and down's rotation


def test_rounding_does_not_depend_on_what_surrounds_it() -> None:
    linear = nn.Linear(150, 48)
    expected = Int8Linear(linear, rotated=True).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = Int8Linear(linear, rotated=True).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        by_default = Int8Linear(linear, rotated=True).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (under_autocast, by_default):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_images_of_a_trained_model() -> None:
    settings = {"class_labels": range(16), "seeds": range(16), "num_inference_steps": 10, "solver": "euler"}
    full, fast = (DiPPipeline.from_pretrained(EMOJI) for _ in range(2))
    fast.to(torch.bfloat16).model.quantize_to_int8()
    pairs = zip(*(pipe(**settings).images for pipe in (full, fast)))
    # of each seed, whose paths may fork: a step's rounding decides between two pictures
    assert statistics.median(psnr(np.asarray(a), np.asarray(b)) for a, b in pairs) > 40


def test_what_it_cannot_do(model_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pipe = DiPPipeline.from_pretrained(model_folder)
    pipe.model.add_adapter(peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora")
    with pytest.raises(UserError, match="int8: fuse the adapters and unload them first"):
        pipe.model.quantize_to_int8()
    settings = {"class_labels": ["ant"], "num_inference_steps": 2, "output_type": "pt"}
    adapted = pipe(**settings).images
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.model.quantize_to_int8()
    assert (pipe(**settings).images - adapted).abs().max() < 0.05
    with pytest.raises(UserError, match=r"LoRA weights: .* load and fuse them before"):
        pipe.load_lora_weights(tmp_path / "lora")
    with pytest.raises(UserError, match="a model in int8 is not saved"):
        pipe.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="layers in int8 have no gradient"):
        pipe.model(torch.randn(1, 3, 16, 16, requires_grad=True), torch.tensor([0.5]), torch.tensor([0]))
    with pytest.raises(UserError, match=r"precision int8: needs a CPU with AVX512-VNNI, and this is none \(mps\)"):
        choose_precision("int8", torch.device("mps"))


def test_the_command_says_what_it_computed_in(model_folder: Path, tmp_path: Path) -> None:
    torch.compiler.reset()
    command = ["sample", str(model_folder), "--seeds", "0-1", "--steps", "2", "--device", "cpu"]
    images = {}
    for name, flags in {"fp32": [], "int8": [], "int8-compiled": ["--compile"]}.items():
        out, (precision, *_) = tmp_path / name, name.split("-")
        assert main([*command, "--precision", precision, *flags, "--out", str(out)]) == 0
        assert json.loads((out / "settings.json").read_text())["precision"] == {"fp32": "float32"}.get(name, "int8")
        images[name] = np.asarray(Image.open(out / "grid.png"))
    for name in ("int8", "int8-compiled"):
        assert (images[name] != images["fp32"]).any()
        assert psnr(images[name], images["fp32"]) > 35


def test_a_benchmarks_limit_counts_both_kinds_of_products() -> None:
    ceilings = {torch.bfloat16: Ceilings(100, 10), torch.int8: Ceilings(200, 10)}
    contender = Contender(lambda: None, 1, 1, torch.bfloat16, 25, int8=Int8Part(600, 20))
    assert contender.floor(1000, ceilings) == 400 / 100 + 600 / 200
    contender.parameters = 1000  # reading them takes longer
    assert contender.floor(1000, ceilings) == (2 * 980 + 20) / 10


def test_a_benchmark_counts_the_products_of_a_step() -> None:
    model = open_model()
    x, y = torch.randn(1, 3, 16, 24), torch.tensor([0])
    plain = sampling_contender(replayed(model), x, y)
    weights = sum(block.get_submodule(name).weight.numel() for block in model.backbone.blocks for name in LAYERS)
    model.quantize_to_int8()
    contender = sampling_contender(replayed(model), x, y)
    assert contender.parameters == plain.parameters
    assert contender.int8 == (2 * 12 * weights, weights)  # 6 tokens, with and without the class
