"""The release's network and samplers, and PixNerd's network, reproduced from their tensors."""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.convert import infer_config, load_release, our_name
from pixeldip.flow import SOLVERS, guided_velocity, time_grid
from pixeldip.model.layers import swiglu_inner

OFFICIAL = Path(__file__).parent / "official"
SPEC = json.loads((OFFICIAL / "tiny16.json").read_text())
NUMBERS = np.load(OFFICIAL / "tiny16.npz")
HEAD_GAINS = {"en": 1.5, "bo": 6.0, "up": 6.0, "de": 1.5, "ou": 0.00025}


def rule(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(n)


def ruled_tensor(name: str, shape: list[int]) -> torch.Tensor:
    n = rule(name, tuple(shape))
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * n
    if len(shape) == 1:
        return 0.1 * n
    if name.startswith("y_embedder"):
        return 2 * n
    gain = 4.0 if name.startswith("t_embedder.") else 1.0
    if name.startswith("local_decoder."):
        gain = HEAD_GAINS[name.split(".")[1][:2]]
    return gain * n / np.prod(shape[1:]) ** 0.5


def tensors() -> dict[str, torch.Tensor]:
    return {name: ruled_tensor(name, shape) for name, shape in SPEC["shapes"].items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "tiny.ckpt"
    state = {f"ema_denoiser.{name}": value for name, value in tensors().items()}
    state |= {f"denoiser.{name}": torch.zeros_like(value) for name, value in tensors().items()}
    state["diffusion_trainer.proj.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": argparse.Namespace(lr=1e-4)}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> DiP:
    return load_release(checkpoint)


def assert_close(ours: torch.Tensor, name: str) -> None:
    theirs = torch.from_numpy(NUMBERS[name])
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def shape() -> tuple[int, int, int, int]:
    config = SPEC["config"]
    return (config["batch"], 3, config["height"], config["width"])


def test_velocity_is_the_releases(model: DiP) -> None:
    batch, classes = SPEC["config"]["batch"], SPEC["config"]["num_classes"]
    with torch.no_grad():
        v = model(rule("tiny16/x", shape()), torch.linspace(0.05, 0.95, batch), torch.arange(batch) % (classes + 1))
    assert_close(v, "velocity")


@pytest.mark.parametrize(
    ("name", "solver", "steps", "scale", "interval", "shift"),
    [
        ("euler10_cfg3_lo0.15_hi1.0_shift1", "euler", 10, 3.0, (0.15, 1.0), 1.0),
        ("euler10_cfg1.5_lo0.3_hi0.8_shift3", "euler", 10, 1.5, (0.3, 0.8), 3.0),
        ("heun6_cfg2_lo0.1_hi1.0_shift1", "heun", 6, 2.0, (0.1, 1.0), 1.0),
    ],
)
def test_samples_are_the_releases(
    model: DiP, name: str, solver: str, steps: int, scale: float, interval: tuple[float, float], shift: float
) -> None:
    batch, classes = SPEC["config"]["batch"], SPEC["config"]["num_classes"]
    velocity = guided_velocity(model, torch.arange(batch) % classes, classes, scale, interval)
    with torch.no_grad():
        x = SOLVERS[solver](velocity, rule("tiny16/z", shape()), time_grid(steps, shift))
    assert_close(x, name)


def test_xl_has_the_releases_tensors() -> None:
    shapes = json.loads((OFFICIAL / "dip_xl_16_shapes.json").read_text())
    with torch.device("meta"):
        model = DiP.from_preset("dip-xl/16")
    assert {our_name(name, depth=26): tuple(s) for name, s in shapes.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    assert model.num_parameters() == 631_989_411
    inferred = infer_config({name: torch.empty(s, device="meta") for name, s in shapes.items()})
    assert {key: model.config[key] for key in inferred} | {"head_width": 64, "head_depth": 4} == inferred


def test_any_width_of_the_mlps_is_told_by_its_tensor() -> None:
    network = tensors()
    hidden_size = SPEC["config"]["hidden_size"]
    for inner in range(1, 4 * hidden_size):
        network["blocks.0.mlp.w1.weight"] = torch.empty(inner, hidden_size, device="meta")
        assert swiglu_inner(hidden_size, infer_config(network)["mlp_ratio"]) == inner
    network["blocks.0.mlp.w1.weight"] = torch.empty(swiglu_inner(hidden_size, 2.0), hidden_size, device="meta")
    assert infer_config(network)["mlp_ratio"] == 2  # as one writes it in a recipe that goes on from it


def test_convert_writes_a_folder_the_pipeline_reads(checkpoint: Path, model: DiP, tmp_path: Path) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "folder")]) == 0
    pipeline = DiPPipeline.from_pretrained(str(tmp_path / "folder"))
    assert (pipeline.config.height, pipeline.config.width) == (256, 256)
    own = pipeline.default_settings
    assert (own.steps, own.solver, own.guidance, own.guidance_interval) == (100, "euler", 4.0, (0.1, 1.0))
    for name, value in model.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], value), name
    assert main(["convert", str(checkpoint), str(tmp_path / "folder")]) == 2  # never over something else
    assert main(["convert", str(checkpoint), str(tmp_path / "other"), "--resolution", "250"]) == 2
    assert not (tmp_path / "other").exists()


def pixnerd_tensors() -> dict[str, torch.Tensor]:
    spec = json.loads((OFFICIAL / "pixnerd_tiny16.json").read_text())
    return {name: ruled_tensor(name, shape) for name, shape in spec["shapes"].items()}


def test_a_pixnerd_checkpoint_is_converted(tmp_path: Path) -> None:
    state = {f"ema_denoiser.{name}": value for name, value in pixnerd_tensors().items()}
    torch.save({"state_dict": state}, tmp_path / "pixnerd.ckpt")
    arguments = ["convert", str(tmp_path / "pixnerd.ckpt"), str(tmp_path / "folder"), "--resolution", "512"]
    assert main(arguments) == 0
    pipeline = DiPPipeline.from_pretrained(str(tmp_path / "folder"))
    assert (pipeline.config.height, pipeline.config.width) == (512, 512)
    config = json.loads((OFFICIAL / "pixnerd_tiny16.json").read_text())["config"]
    batch, classes = config["batch"], config["num_classes"]
    x = rule("pixnerd_tiny16/x", (batch, 3, config["height"], config["width"]))
    with torch.no_grad():
        v = pipeline.model(x, torch.linspace(0.05, 0.95, batch), torch.arange(batch) % (classes + 1))
    theirs = torch.from_numpy(np.load(OFFICIAL / "pixnerd_tiny16.npz")["velocity"])
    assert (v - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("name", "message"),
    [("blocks.3.norm.weight", "Missing .*detailer.blocks.1.norm"), ("final_layer.linear.bias", "detailer.out.bias")],
)
def test_a_pixnerd_checkpoint_with_a_hole(tmp_path: Path, name: str, message: str) -> None:
    state = pixnerd_tensors()
    del state[name]
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        load_release(tmp_path / "x.ckpt")


def test_raw_weights_are_the_other_ones(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["convert", str(checkpoint), str(tmp_path / "raw"), "--weights", "model"]) == 0
    for raw in (load_release(checkpoint, weights="model"), DiPPipeline.from_pretrained(tmp_path / "raw").model):
        assert raw.detailer.out.weight.abs().max() == 0


def test_weights_without_prefixes_are_one_set(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "x.ckpt")
    load_release(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="holds one set of weights, whose names do not say which; leave --weights out"):
        load_release(tmp_path / "x.ckpt", weights="model")


class Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("bomb-went-off"),))


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {f"ema_denoiser.{name}": value for name, value in tensors().items()}
    torch.save({"callbacks": {"x": Bomb()}, "state_dict": state}, "bomb.ckpt")
    load_release("bomb.ckpt")
    assert not Path("bomb-went-off").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.w3.weight"), "blocks.1.mlp.up.weight"),
        (lambda s: s.update({"blocks.0.extra.weight": torch.zeros(1)}), "blocks.0.extra.weight"),
        (lambda s: s.update(one=torch.zeros(1), two=torch.zeros(1)), "Unknown: one, two"),
        (lambda s: s.update({"s_embedder.proj.bias": torch.zeros(3)}), "s_embedder.proj.bias has shape"),
        (lambda s: s.pop("s_embedder.proj.weight"), "s_embedder.proj.weight"),
        (lambda s: s.update({"blocks.0.norm1.weight": "text"}), "blocks.0.norm1.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(tmp_path: Path, change, message: str) -> None:
    state = tensors()
    change(state)
    torch.save({"state_dict": {f"ema_denoiser.{name}": value for name, value in state.items()}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        load_release(tmp_path / "x.ckpt")


def test_a_damaged_checkpoint_is_a_users_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.ckpt: cannot be read"):
        load_release(tmp_path / "cut.ckpt")
