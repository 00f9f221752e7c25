"""What a plan says is what a training takes: its bytes, its FLOPs, its checkpoints; and it starts nothing."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pixeldip import UserError
from pixeldip.bench.timing import count_flops
from pixeldip.cli import main
from pixeldip.data import class_count
from pixeldip.model import PRESETS
from pixeldip.plan import plan
from pixeldip.plan.step import LiveBytes, PaperStep
from pixeldip.recipe import DataSection, load_recipe, parse_recipe
from pixeldip.run_folder import PIPELINE, TRAINING_STATE, checkpoints
from pixeldip.settings import PlanOptions
from pixeldip.training import train
from pixeldip.training.preparation import model_config

from .conftest import TINY_MODEL, tiny_recipe

RECIPES = sorted(path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"))
WIDE = {"hidden_size": 4096, "depth": 4, "num_heads": 32}
FEW_SMALL = PlanOptions((8,), "RTX 4090")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    recipe.model.depth, recipe.alignment.block = 1, 1  # the blocks are alike
    rows = plan(recipe, PlanOptions((1, 2, 1024), "H200")).rows
    assert rows[0].memory > 16 * rows[0].images and rows[0].run_seconds > rows[1].run_seconds > 0
    assert rows[1].state["buckets"] == rows[1].state["AdamW"] / 2 and "buckets" not in rows[0].state
    assert rows[2].images is None and "less than one image" in rows[2].warning
    assert not list(tmp_path.iterdir()) and not torch.distributed.is_initialized()


def test_the_command(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--plan", "--plan.devices", "8", "24", "--plan.price", "2", "--model.preset", "dip-s/16"]
    assert main(["train", "imagenet256-dip-xl", *flags]) == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    row, uneven = record["rows"]
    assert record["parameters"]["model"] == PRESETS["dip-s/16"].parameters and row["images"] == 32
    assert 86e6 < record["parameters"]["encoder"] < 87e6 and "encoder" in row["state"]
    assert row["cost"] == pytest.approx(2 * 8 * row["run_seconds"] / 3600)
    speed = 0.4 * 989e12
    assert row["seconds"] == pytest.approx(row["flops"] / 8 / speed) and row["run_seconds"] == 800_000 * row["seconds"]
    assert "240 and 264 can" in uneven["warning"] and uneven["warning"] in printed
    assert "not in it: communication" in printed and "1000 classes" in printed
    assert not list(tmp_path.iterdir())


def test_a_preset_takes_the_place_of_sizes_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = "data: {source: emoji, resolution: 64}\nmodel: {hidden_size: 32, num_heads: 2, prediction: image}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    flags = ["--model.preset", "dip-s/16", "--model.depth", "1", "--plan", "--plan.devices", "1"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *flags]) == 0
    config = json.loads(capsys.readouterr().out.splitlines()[-1])["config"]
    assert (config["hidden_size"], config["depth"], config["prediction"]) == (384, 1, "image")


@pytest.fixture
def on_real_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes compute."""
    monkeypatch.setattr(PaperStep, "_without_data", lambda self: contextlib.nullcontext())


def _steps(**training: object) -> PaperStep:
    recipe = parse_recipe({"model": TINY_MODEL, "data": {"resolution": [16, 24]}, "training": training})
    return PaperStep(recipe, model_config(recipe.model, 3), torch.bfloat16)


@pytest.mark.parametrize("accumulating", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_and_flops_are_those_of_a_step(
    checkpointing: bool, accumulating: bool, request: pytest.FixtureRequest
) -> None:
    paper = _steps(gradient_checkpointing=checkpointing)
    said = paper.peak_bytes(7, checkpointing, accumulating), paper.flops(7)
    request.getfixturevalue("on_real_tensors")
    real = _steps(gradient_checkpointing=checkpointing)
    real._checkpoint(checkpointing)
    assert max(real._timeline(7, accumulating)) == pytest.approx(said[0], rel=0.01)
    assert count_flops(lambda: real._pass(7)) == said[1]


def test_what_checkpointing_and_fused_kernels_save() -> None:
    step, unfused = (
        _steps(),
        PaperStep(_steps().recipe, _steps().model.config, torch.bfloat16, fused=False),
    )
    assert step.peak_bytes(64, True, False) < step.peak_bytes(64, False, False) < unfused.peak_bytes(64, False, False)
    assert step.peak_bytes(64, False, True) > step.peak_bytes(64, False, False)


def test_live_bytes_are_those_not_yet_freed() -> None:
    known = torch.zeros(10)
    with LiveBytes([known]) as live:
        a = torch.zeros(100)
        view = known.view(2, 5) + 1
        b = a[:50] * 2
        del a, view
        b = b.clone()
    assert live.timeline[-1] == 4 * 100 and max(live.timeline) == 4 * (100 + 10 + 50) and b.numel() == 50


def test_no_attention_matrix_is_held() -> None:
    model = {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 8, "head": "linear"}
    recipe = parse_recipe({"model": model, "data": {"resolution": 128}})
    step = PaperStep(recipe, model_config(recipe.model, 3), torch.bfloat16)
    matrix = 8 * (32 * 32) ** 2 * torch.bfloat16.itemsize
    assert step.peak_bytes(9, False, False) - step.peak_bytes(8, False, False) < matrix


def test_checkpoints_are_as_large_as_said(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", "emoji", model={"hidden_size": 192, "depth": 3})
    said = plan(recipe, PlanOptions((1,))).checkpoint
    train(recipe, Console(quiet=True))
    folders = checkpoints(tmp_path / "run")
    for folder in folders:
        written = sum(file.stat().st_size for file in (folder / TRAINING_STATE).iterdir())
        assert written == pytest.approx(said.training_state, rel=0.05)
        assert _size(folder / PIPELINE) == pytest.approx(said.pipeline, rel=0.05)
    assert (len(folders) + 1) * _size(folders[0]) == pytest.approx(said.on_disk, rel=0.05)
    adapting = {"hidden_size": 192, "depth": 3, "pretrained": str(tmp_path / "run"), "lora_rank": 2}
    recipe = tiny_recipe(tmp_path / "adapted", "emoji", model=adapting, training={"steps": 1})
    said = plan(recipe, PlanOptions((1,))).checkpoint
    train(recipe, Console(quiet=True))
    (folder,) = checkpoints(tmp_path / "adapted")
    assert _size(folder / TRAINING_STATE) == pytest.approx(said.training_state, rel=0.05)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_does_not_fit_and_what_would() -> None:
    recipe = parse_recipe({"model": {"preset": "dip-s/16", "depth": 1}, "data": {"resolution": 256}})
    recipe.training.batch_size = 4096
    (row,) = plan(recipe, FEW_SMALL).rows
    assert row.memory > 0.9 * 24e9 and "do not fit 21.6 GB" in row.warning
    recipe.training.gradient_accumulation = int(re.search(r"gradient_accumulation (\d+)", row.warning)[1])
    (row,) = plan(recipe, FEW_SMALL).rows
    assert row.warning is None and row.images == 512 // recipe.training.gradient_accumulation
    (row,) = plan(parse_recipe({"model": WIDE, "data": {"resolution": 256}}), FEW_SMALL).rows
    assert "however few the images" in row.warning


def test_sharded_it_is_divided() -> None:
    recipe = parse_recipe({"model": {"preset": "dip-s/16", "depth": 4}, "data": {"resolution": 64}})
    recipe.training.batch_size = 8
    (whole,) = plan(recipe, PlanOptions((8,))).rows
    recipe.training.shard = True
    alone, parts = plan(recipe, PlanOptions((1, 8))).rows
    for name in ("weights", "average", "AdamW"):
        assert parts.state[name] == pytest.approx(whole.state[name] / 8) and alone.state[name] == whole.state[name]
    weights = whole.state["weights"]
    assert parts.state["gradients"] == pytest.approx(weights / 8) and "buckets" not in parts.state
    assert whole.step > weights > parts.step  # all gradients at the end of a pass; but activations and two blocks
    assert parts.flops == whole.flops


def test_speed_of_fp32_is_not_guessed() -> None:
    planned = plan(parse_recipe({"model": TINY_MODEL, "training": {"precision": "fp32"}}), PlanOptions((8,)))
    assert planned.rows[0].seconds is None and any("fp32" in note for note in planned.notes)


def test_classes(picture_folder: Path) -> None:
    assert class_count(DataSection(str(picture_folder))) == 2 and class_count(DataSection("emoji")) == 10
    assert class_count(DataSection(str(picture_folder / "ant"))) == 0
    assert class_count(DataSection(label_column="none")) == 0
    assert class_count(DataSection("nowhere")) is class_count(DataSection("owner/name")) is None


def test_a_model_to_start_from(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path / "run", "emoji", training={"steps": 1}), Console(quiet=True))
    recipe = parse_recipe({"model": {"pretrained": str(tmp_path / "run"), "lora_rank": 2}})
    (row,) = plan(recipe, PlanOptions((2,))).rows
    assert 0 < row.state["buckets"] < row.state["weights"] / 4
    recipe.model.depth = TINY_MODEL["depth"] + 1
    with pytest.raises(UserError, match=r"only adapters would be trained, and backbone.blocks.2\."):
        plan(recipe, PlanOptions((2,)))
    recipe.model.hidden_size = 64
    with pytest.raises(UserError, match="nothing of its blocks fits"):
        plan(recipe, PlanOptions((2,)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan.device", "H1000"], "perhaps 'H100'"),
        (["--plan.device", "abacus"], "there are GH200, H200 NVL, H200, H100 PCIe"),
        (["--plan.devices", "8", "0"], "--plan.devices: input should be greater than or equal to 1, found 0"),
        (["--plan.utilisation", "1.5"], "--plan.utilisation: input should be"),
        (["--training.gradient-accumulation", "3"], "must be a multiple of 3"),
        (["--model.preset", "dip-s/15"], "no preset"),
        (["--data.source", ".", "--out", "runs/first"], "out runs/first: lies in data.source ."),
        (["--model.pretrained", "owner/name"], "run folders and saved models of this machine only"),
    ],
)
def test_mistakes(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "my-images", "--plan", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_names_are_no_markup(capsys: pytest.CaptureFixture) -> None:
    alignment = ["--alignment.weight", "0.5", "--alignment.block", "1", "--alignment.encoder", "[/b]/[red]"]
    assert main(["train", "demo", "--plan", "--plan.devices", "1", *alignment]) == 0
    assert "alignment.encoder [/b]/[red] is not in it" in capsys.readouterr().out


def test_options_of_a_plan_start_no_training(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "demo", "--plan.price", "2"]) == 2
    assert "belong to --plan" in capsys.readouterr().err
