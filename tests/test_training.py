"""The run: what it learns, averages, measures, and says of it."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pixeldip import DiP, DiPPipeline, UserError, processes
from pixeldip.bench.timing import count_flops
from pixeldip.flow import OBJECTIVES
from pixeldip.processes import Processes, choose_precision
from pixeldip.recipe import FlowSection, OptimizerSection, load_recipe
from pixeldip.run_folder import checkpoints, read_metrics
from pixeldip.training import train
from pixeldip.training.devices import peak_flops
from pixeldip.training.ema import EMA
from pixeldip.training.flops import training_flops
from pixeldip.training.preparation import build_model
from pixeldip.training.progress import Progress
from pixeldip.training.schedule import draw, learning_rate

from . import make_losses
from .conftest import QUIET, make_picture, saved_state, tiny_recipe


def test_a_run_learns_and_says_so(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "run",
        picture_folder,
        training={"steps": 60, "log_every": 10, "save_every": 15},
        preview={"every": 30, "images": 4, "steps": 2},
    )
    recipe.optimizer.lr, recipe.optimizer.warmup_steps = 3e-3, 0
    outcome = train(recipe, QUIET)
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run")]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert (outcome.step, outcome.interrupted_by) == (60, None)
    assert [path.name for path in sorted((tmp_path / "run" / "previews").iterdir())] == [
        "step-00000030.png",
        "step-00000060.png",
    ]
    kept = checkpoints(tmp_path / "run")
    assert len(kept) == recipe.training.keep_last
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == kept  # nothing is left of the others
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["command"]
    pipeline = DiPPipeline.from_pretrained(str(tmp_path / "run"))
    assert pipeline.config.class_names == ["ant", "bee"] and pipeline.config.height == 16


def test_a_logged_loss_is_the_mean_since_the_one_before(tmp_path: Path, picture_folder: Path) -> None:
    """Also at checkpoints, where it may be resumed. The norm and the rate are the last step's."""
    for every in (1, 3):
        training = {"log_every": every, "save_every": 2}
        train(tiny_recipe(tmp_path / str(every), picture_folder, training=training), QUIET)
    each, logged = (read_metrics(tmp_path / name) for name in ("1", "3"))
    assert [entry["step"] for entry in logged] == [2, 3, 4, 6]
    for entry, steps in zip(logged, (each[:2], each[2:3], each[3:4], each[4:]), strict=True):
        assert entry["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps), rel=1e-6)
        assert all(entry[name] == steps[-1][name] for name in ("gradient_norm", "lr"))
    assert len({entry["lr"] for entry in each}) == 6


def test_randomness_belongs_to_the_position() -> None:
    from pixeldip.data import Batch

    def drawn(positions: list[int]) -> tuple:
        batch = Batch(torch.zeros(0), torch.ones(len(positions), dtype=torch.long), positions, {})
        images = torch.zeros(len(positions), 3, 4, 4)
        return draw(FlowSection(class_dropout=0.5), OBJECTIVES["velocity"], batch, images, 9, seed=3)

    whole, part = drawn(list(range(200))), drawn([120, 7])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[[120, 7]], b)
    labels, noise, t = whole
    assert 70 < (labels == 9).sum() < 130
    assert abs(noise.std() - 1) < 0.05 and abs(t.mean() - 0.5) < 0.05 and abs(t.std() - 0.208) < 0.03


def test_average_is_over_weights_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.zero_()
    ema = EMA(model, decay=0.75)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].running_mean.fill_(2.0)
        model[1].num_batches_tracked.fill_(7)
    ema.update(model, step=0)  # decay (1 + 0) / (10 + 0)
    assert torch.allclose(ema.model[0].weight, torch.tensor(0.9)) and torch.allclose(
        ema.model[1].running_mean, torch.tensor(1.8)
    )
    ema.update(model, step=1000)  # the decay asked for
    assert torch.allclose(ema.model[0].weight, torch.tensor(0.925))
    assert ema.model[1].num_batches_tracked == 7 and not any(p.requires_grad for p in ema.model.parameters())


def test_learning_rate() -> None:
    section = OptimizerSection(lr=1.0, warmup_steps=10, schedule="constant")
    assert [learning_rate(section, step, 100) for step in (0, 4, 9, 99)] == [0.1, 0.5, 1.0, 1.0]
    section = OptimizerSection(lr=1.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(section, 0, 100) == 1.0 and learning_rate(section, 50, 100) == pytest.approx(0.505)
    section = OptimizerSection(lr=1.0, warmup_steps=2, schedule="constant", cooldown_steps=4)
    assert [learning_rate(section, step, 10) for step in (0, 5, 6, 7, 9)] == [0.5, 1.0, 1.0, 0.75, 0.25]


def test_a_seed_is_a_model() -> None:
    section = tiny_recipe(Path("x"), "y").model
    a, b, c = (build_model(section, 3, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["backbone.patch_embed.weight"], c["backbone.patch_embed.weight"])


def test_what_is_saved_is_the_average(tmp_path: Path, picture_folder: Path) -> None:
    sections = {"training": {"save_every": 1, "keep_last": 9, "ema_decay": 0.15}}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, **sections)
    train(recipe, QUIET)
    average = build_model(recipe.model, 2, recipe.training.seed).state_dict()
    for step, folder in enumerate(checkpoints(tmp_path / "run")):
        weight = 1 - min(0.15, (1 + step) / (10 + step))
        state = saved_state(folder)
        average = {name: a + weight * (state[f"network.{name}"] - a) for name, a in average.items()}
    saved = DiPPipeline.from_pretrained(tmp_path / "run").model.state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.allclose(value, state[f"network.{name}"], rtol=1e-4) for name, value in saved.items())


def test_without_classes(tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture) -> None:
    (picture_folder / "ant" / "photo.heic").write_bytes(b"")
    make_picture(0, 8, 8).save(picture_folder / "ant" / "small.png")
    sections = {"data": {"resolution": [16, 24]}, "preview": {"every": 6, "images": 4, "steps": 2}}
    recipe = tiny_recipe(tmp_path / "run", picture_folder / "ant", **sections)
    train(recipe)
    told = capsys.readouterr().out
    for warning in ("files passed over", "1 of 7 images are smaller than 16x24"):
        assert f"warning: data.source {picture_folder / 'ant'}: {warning}" in told
    pipeline = DiPPipeline.from_pretrained(str(tmp_path / "run"))
    for noise, count in ({"seeds": [0, 1]}, 2), ({"generator": [torch.Generator(), torch.Generator()]}, 2), ({}, 1):
        assert [image.size for image in pipeline(**noise, num_inference_steps=2).images] == count * [(24, 16)]
    with pytest.raises(UserError, match="trained without classes"):
        pipeline(class_labels=[0])


@pytest.mark.parametrize("inside", [".", "runs/first"])
def test_a_run_among_its_own_images_is_refused(inside: str, tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(picture_folder / inside, picture_folder)
    with pytest.raises(UserError, match=rf"out {recipe.out}: lies in data.source .* choose a folder outside of it"):
        train(recipe, QUIET)
    assert sorted(path.name for path in picture_folder.iterdir()) == ["ant", "bee"]
    earlier = tiny_recipe(tmp_path / "earlier", picture_folder, training={"steps": 1})
    train(earlier, QUIET)
    (tmp_path / "earlier").rename(picture_folder / "earlier")
    with pytest.raises(UserError, match=r"data.source .*/earlier is a run folder, whose samples are images, too"):
        train(tiny_recipe(tmp_path / "run", picture_folder), QUIET)


def test_a_run_and_a_saved_model_share_no_folder(tmp_path: Path, picture_folder: Path, model_folder: Path) -> None:
    """The saved model was what the folder's name stood for, whatever the run trained."""
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training={"steps": 1})
    train(recipe, QUIET)
    pipeline = DiPPipeline.from_pretrained(tmp_path / "run")
    (checkpoint,) = checkpoints(tmp_path / "run")
    for folder in (tmp_path / "run", checkpoint / "pipeline"):
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match=f"{folder}: a run's folder, .* save to a folder of its own"):
            pipeline.save_pretrained(folder)
        assert sorted(folder.rglob("*")) == before
    shutil.copytree(model_folder, tmp_path / "model")
    recipe.out = str(tmp_path / "model")
    with pytest.raises(UserError, match=f"out {recipe.out}: holds a saved model, .* choose another folder"):
        train(recipe, QUIET)
    assert not (tmp_path / "model" / "checkpoints").exists()


def test_half_an_environment_of_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start with torchrun"):
        train(tiny_recipe(tmp_path / "run", "emoji"), QUIET)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE 2 but not MASTER_ADDR.* start with torchrun"):
        train(tiny_recipe(tmp_path / "run", "emoji"), QUIET)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"in the environment: .*'two'; start with torchrun"):
        train(tiny_recipe(tmp_path / "run", "emoji"), QUIET)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("faster", [True, False])
def test_bf16_where_it_is_faster(instructions: bool, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def product(tokens: Tensor, weight: Tensor) -> None:
        nonlocal clock
        clock += 1 if (tokens.dtype == torch.bfloat16) == faster else 2

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(time, "thread_time", lambda: clock)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(processes, "_cpu_gains_from_bf16", processes._multiplies_faster_in_bf16)  # asked anew
    expected = torch.bfloat16 if instructions and faster else torch.float32
    assert choose_precision("auto", torch.device("cpu")) == expected


def test_precision_follows_the_device() -> None:
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert choose_precision("auto", torch.device("mps")) == torch.float32
    assert Processes(0, 1, torch.device("cpu")).is_main


def test_speed_is_of_the_training_alone(tmp_path: Path) -> None:
    """An hour of previews before the first of two logged steps leaves nothing of its time to the training."""
    with Progress(tmp_path, tiny_recipe(tmp_path, "emoji"), QUIET, 0, Processes(0, 1, torch.device("cpu"))) as progress:
        progress.pause(3600)
        for step in (1, 2):
            progress.step(step, None, 0.0, loss=1.0)
    first, second = (entry["images_per_second"] for entry in read_metrics(tmp_path))
    assert first > 1e9 > second  # none of it is taken off twice


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200 NVL", 835), ("NVIDIA T4", None)],
)
def test_a_device_is_known_by_its_whole_name(name: str, teraflops: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (teraflops and teraflops * 1e12)


def test_metrics_during_training(tmp_path: Path, picture_folder: Path) -> None:
    """Logged like the loss, against the training images by default; and the training is not changed by it."""
    evaluation = {"every": 2, "images": 6, "steps": 2, "metrics": ["kid_efficientnet", "nearest", "boundary"]}
    logging = {"trackers": ["tensorboard"]}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, evaluation=evaluation, logging=logging)
    train(recipe, QUIET)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("event") == "evaluation"]
    assert [line["step"] for line in found] == [2, 4, 6]
    values = [line["metrics"]["kid_efficientnet"] for line in found]
    assert len(set(values)) == 3 and all(value > found[0]["floors"]["kid_efficientnet"]["real"] for value in values)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("evaluation/kid_efficientnet")] == pytest.approx(values)
    train(tiny_recipe(tmp_path / "plain", picture_folder), QUIET)
    losses = [[m["loss"] for m in read_metrics(tmp_path / name)] for name in ("run", "plain")]
    assert losses[0] == losses[1]
    tracked = events.Scalars("loss")
    assert [e.step for e in tracked] == list(range(1, 7)) and [e.value for e in tracked] == pytest.approx(losses[0])


def test_metrics_against_whatever_the_training_accepts(
    tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """A broken file gives its place to the next one, small pictures are enlarged: as in training."""
    (picture_folder / "ant" / "2.png").write_bytes(b"broken")
    recipe = tiny_recipe(
        tmp_path / "run",
        picture_folder,
        data={"resolution": 64, "max_broken": 0.5},
        evaluation={"every": 6, "images": 4, "steps": 1, "metrics": ["kid_efficientnet", "boundary"]},
    )
    train(recipe)
    assert '"event": "evaluation"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert capsys.readouterr().out.count("2.png") == 1  # that it is skipped is said once


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"metrics": ["fidd"]}, "no metric 'fidd'"),
        ({"reference_split": "test"}, "evaluation.reference_split: of which images"),
    ],
)
def test_metrics_that_cannot_be_had_stop_the_run_before_it_starts(
    evaluation: dict, message: str, tmp_path: Path, picture_folder: Path
) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder, evaluation={"every": 2, **evaluation})
    with pytest.raises(UserError, match=message):
        train(recipe, QUIET)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("head", ["unet", "coordinate_mlp", "attention"])
def test_flops_need_no_computing(head: str) -> None:
    """What MFU goes by is counted on shapes alone, whatever the model's device, and is what a real pass takes."""
    model = DiP(patch_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=3, head=head).train()

    def counted(images: int) -> int:
        x, t, y = torch.randn(images, 3, 32, 32), torch.rand(images), torch.zeros(images, dtype=torch.long)
        return count_flops(lambda: model(x, t, y).sum().backward())

    whole = training_flops(model, 32, 32)
    assert whole == counted(2) - counted(1)
    model.enable_gradient_checkpointing()
    assert training_flops(model, 32, 32) == whole
    model.disable_gradient_checkpointing()
    model.detailer.requires_grad_(False)
    assert training_flops(model, 32, 32) == counted(2) - counted(1) < whole


def test_losses_are_what_they_were(tmp_path: Path) -> None:
    """Against a file, so that a change that moves all runs alike is seen, too."""
    expected = json.loads(make_losses.FILE.read_text(encoding="utf-8"))
    found = make_losses.losses(tmp_path)
    assert found.keys() == expected.keys()
    for name, losses in found.items():
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[name]), rtol=2e-4, atol=0, msg=name)
