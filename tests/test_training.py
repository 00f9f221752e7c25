"""The run: exact resume, many processes, averages, refusals."""

import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.bench.timing import count_flops
from pixeldip.flow import OBJECTIVES
from pixeldip.processes import Processes, choose_precision
from pixeldip.recipe import (
    AlignmentSection,
    FlowSection,
    OptimizerSection,
    PreviewSection,
    SamplingFlags,
    SamplingSettings,
    load_recipe,
    parse_recipe,
    recipe_values,
    save_recipe,
)
from pixeldip.run_folder import checkpoints, newest_checkpoint, read_metrics
from pixeldip.training import train
from pixeldip.training.ema import EMA
from pixeldip.training.preparation import build_model, check_recipe, check_resume
from pixeldip.training.preview import preview_classes, read_previews, save_preview
from pixeldip.training.progress import training_flops
from pixeldip.training.schedule import draw, learning_rate

from . import make_losses
from .conftest import TINY_MODEL, make_picture, opened_up, saved_state, tiny_recipe

QUIET = Console(quiet=True)
TRAIN = [sys.executable, "-m", "pixeldip.cli", "train"]
PATIENCE = 300  # seconds; a busy machine ends late


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint: weights, optimizer state and averaged weights."""
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    tensors = saved_state(checkpoint)
    ema = DiPPipeline.from_pretrained(str(run)).model.state_dict()
    return tensors | {f"ema.{name}": value for name, value in ema.items()}


def assert_same_state(a: Path, b: Path) -> None:
    ours, theirs = state_of(a), state_of(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


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
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    assert (outcome.step, outcome.interrupted_by) == (60, None)
    assert [path.name for path in sorted((tmp_path / "run" / "previews").iterdir())] == [
        "step-00000030.png",
        "step-00000060.png",
    ]
    assert len(checkpoints(tmp_path / "run")) == recipe.training.keep_last
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["command"]
    pipeline = DiPPipeline.from_pretrained(str(tmp_path / "run"))
    assert pipeline.config.class_names == ["ant", "bee"] and pipeline.config.height == 16


def test_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path: Path, picture_folder: Path) -> None:
    steps = {"steps": 100, "save_every": 3}
    straight, broken = tiny_recipe(tmp_path / "a", picture_folder, training=steps), tmp_path / "b.yaml"
    straight.data.flip = True
    train(straight, QUIET)
    interrupted = parse_recipe({**recipe_values(straight), "out": str(tmp_path / "b")})
    save_recipe(interrupted, broken)
    dice = random.Random(0)
    for _ in range(2):
        goal = (newest_step(tmp_path / "b") or 0) + dice.randint(4, 12)
        process = subprocess.Popen([*TRAIN, str(broken)], stdout=subprocess.DEVNULL)
        while last_step(tmp_path / "b") < goal and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert 0 < newest_step(tmp_path / "b") < 100
    train(interrupted, QUIET)
    assert_same_state(tmp_path / "a", tmp_path / "b")


def newest_step(run: Path) -> int:
    checkpoint = newest_checkpoint(run)
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def last_step(run: Path) -> int:
    metrics = read_metrics(run)
    return int(metrics[-1]["step"]) if metrics else 0


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGINT, 1), (signal.SIGTERM, 1)])
def test_a_signal_saves_and_the_same_command_goes_on(
    number: int, workers: int, tmp_path: Path, picture_folder: Path
) -> None:
    """Sent to the whole group, as terminals and torchrun do, with processes in it that read images."""
    data = {"in_memory": not workers, "workers": workers}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, data=data, training={"steps": 3000, "save_every": 3000})
    save_recipe(recipe, tmp_path / "r.yaml")
    command = [*TRAIN, str(tmp_path / "r.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while last_step(tmp_path / "run") < 5 and process.poll() is None:
                time.sleep(0.02)
            for _ in range(2):  # as torchrun does, which passes on what the terminal has sent already
                os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    stopped = newest_step(tmp_path / "run")
    assert process.returncode == 128 + number and 5 <= stopped < 3000
    assert f"stopped after step {stopped}" in output
    recipe.training.steps = stopped + 2
    assert train(recipe, QUIET).step == stopped + 2
    assert [e["step"] for e in read_metrics(tmp_path / "run")] == list(range(1, stopped + 3))


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


def test_a_seed_is_a_model() -> None:
    section = tiny_recipe(Path("x"), "y").model
    a, b, c = (build_model(section, 3, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["backbone.patch_embed.weight"], c["backbone.patch_embed.weight"])


def test_a_checkpoint_half_written_is_not_there(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder)
    train(recipe, QUIET)
    partial = tmp_path / "run" / "checkpoints" / "partial-step-00000009"
    partial.mkdir()
    (partial / "half.safetensors").write_bytes(b"half")
    assert newest_step(tmp_path / "run") == 6


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder)
    train(recipe, QUIET)
    other = tiny_recipe(tmp_path / "run", picture_folder, model={"depth": 3})
    with pytest.raises(UserError, match=r"model.depth = 2, and this one asks for 3"):
        train(other, QUIET)


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of the values, which are of no right type
def test_what_a_resume_may_change(tmp_path: Path) -> None:
    """How long a run goes on, where, and how it is watched; nothing that enters what is computed."""
    may_change = {
        *("out", "preview", "evaluation", "logging"),
        *("data.source", "data.workers", "data.timeout", "data.in_memory", "data.max_broken", "data.accept_changes"),
        *("training.steps", "training.log_every", "training.save_every", "training.keep_last", "training.device"),
        *("training.gradient_checkpointing", "training.gradient_accumulation", "training.shard"),
        *("training.on_divergence", "training.gradient_limit", "training.skip_limit"),
    }
    recipe = tiny_recipe(tmp_path / "run", "emoji")
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    save_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    check_resume(tmp_path / "run", recipe)
    for section in dataclasses.fields(recipe):
        own = getattr(recipe, section.name)
        keys = [field.name for field in dataclasses.fields(own)] if dataclasses.is_dataclass(own) else [None]
        for key in keys:
            other, name = copy.deepcopy(recipe), section.name if key is None else f"{section.name}.{key}"
            setattr(*(other, section.name) if key is None else (getattr(other, section.name), key), "another")
            if {section.name, name} & may_change:
                check_resume(tmp_path / "run", other)
            else:
                with pytest.raises(UserError, match=f"holds a run with {name} = "):
                    check_resume(tmp_path / "run", other)


def test_steps_that_a_resume_went_back_behind_count_as_they_were_run_again(tmp_path: Path) -> None:
    def line(step: int, loss: float) -> dict:
        return {"step": step, "loss": loss, "images_per_second": 1.0}

    entries = [*(line(step, 1.0) for step in range(1, 7)), {"event": "start", "step": 3}, line(4, 9.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 9.0)]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, torch.Tensor]]:
    """What three steps leave behind: three_steps(section, key, value) with one value of the recipe changed."""
    folder = tmp_path_factory.mktemp("three")
    for i in range(6):
        (folder / "pictures" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        make_picture(i).save(folder / "pictures" / "ab"[i % 2] / f"{i}.png")

    def run(section: str = "data", key: str = "flip", value: object = False) -> dict[str, torch.Tensor]:
        out = folder / f"{section}-{key}-{value}"
        recipe = tiny_recipe(out, folder / "pictures", **{section: {key: value}})
        recipe.training.steps = 3
        train(recipe, QUIET)
        return saved_state(newest_checkpoint(out))

    return run


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("optimizer", "lr", 1e-2), ("optimizer", "betas", [0.5, 0.9]), ("optimizer", "betas", [0.9, 0.5])),
        *(("optimizer", "weight_decay", 0.5), ("optimizer", "gradient_clip", 1e-3), ("optimizer", "warmup_steps", 2)),
        *(("flow", "time_mean", 1.0), ("flow", "time_std", 0.3), ("flow", "time_shift", 3.0)),
        *(("flow", "time_distribution", "uniform"), ("flow", "class_dropout", 0.9)),
        *(("training", "seed", 1), ("training", "batch_size", 6), ("data", "flip", True)),
    ],
)
def test_every_value_of_the_recipe_is_felt(
    section: str, key: str, value: object, three_steps: Callable[..., dict[str, torch.Tensor]]
) -> None:
    plain, changed = three_steps(), three_steps(section, key, value)
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)


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


def test_a_run_is_sampled_as_its_previews_are(tmp_path: Path, picture_folder: Path) -> None:
    own = SamplingSettings(3, "heun", 1.5, (0.2, 0.9), 2.0)
    preview = {"every": 6, "images": 4, **dataclasses.asdict(own)}
    train(tiny_recipe(tmp_path / "run", picture_folder, preview=preview), QUIET)
    pipeline = DiPPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.default_settings == own
    ((step, found),) = read_previews(tmp_path / "run", (16, 16), 4, num_classes=2).items()
    images = pipeline(preview_classes(4, 2)[1], seeds=range(4)).images
    assert step == 6 and all(np.array_equal(a, np.asarray(b)) for a, b in zip(found, images, strict=True))
    assert SamplingFlags(steps=7).settings(own) == dataclasses.replace(own, steps=7)


def test_without_classes(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder / "ant", preview={"every": 6, "images": 4, "steps": 2})
    train(recipe, QUIET)
    pipeline = DiPPipeline.from_pretrained(str(tmp_path / "run"))
    assert len(pipeline(seeds=[0, 1], num_inference_steps=2).images) == 2
    with pytest.raises(UserError, match="trained without classes"):
        pipeline(class_labels=[0])


@pytest.mark.parametrize(
    ("images", "num_classes", "columns", "rows"),
    [
        (20, 10, 2, list(range(10))),
        (32, 10, 4, [0, 1, 2, 3, 5, 6, 7, 8]),
        (99, 99, 9, list(range(0, 99, 9))),
        (64, 1000, 8, list(range(0, 1000, 125))),
        (4, 1, 4, [0]),
    ],
)
def test_a_preview_has_a_row_per_class(images: int, num_classes: int, columns: int, rows: list[int]) -> None:
    across, labels = preview_classes(images, num_classes)
    assert across == columns and [labels[i] for i in range(0, images, columns)] == rows
    assert labels == sorted(labels) and preview_classes(images, 0) == (int(images**0.5), None)


@pytest.mark.parametrize("side", [16, 32, 80])  # a screen shows them enlarged by 4, 2 and 1
def test_previews_are_cut_apart_again(side: int, tmp_path: Path) -> None:
    model, pipeline = opened_up(DiP(**TINY_MODEL, num_classes=0)), {"height": side, "width": side}
    preview = PreviewSection(images=4, steps=2)
    save_preview(tmp_path, 7, model, pipeline, preview)
    ((step, found),) = read_previews(tmp_path, (side, side), 4).items()
    images = DiPPipeline(model, **pipeline)(seeds=range(4), **preview.pipeline_arguments()).images
    assert step == 7 and all(np.array_equal(a, np.asarray(b)) for a, b in zip(found, images, strict=True))


def test_the_average_is_sampled_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernel that moves it leaves no trace of having done so, as fused ones do."""

    def fused(tensors: list[torch.Tensor], ends: list[torch.Tensor], weight: float) -> None:
        for tensor, end in zip(tensors, ends):
            tensor.data.lerp_(end, weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", fused)
    model = opened_up(DiP(**TINY_MODEL))
    ema, fresh = EMA(model, 0.5), DiP(**TINY_MODEL).eval()
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    with torch.no_grad():
        before = ema.model(x, t, y)  # from here on the head keeps what it composed
        ema.update(opened_up(model), 5)
        fresh.load_state_dict(ema.model.state_dict())
        assert not torch.allclose(ema.model(x, t, y), before)
        torch.testing.assert_close(ema.model(x, t, y), fresh(x, t, y))


@pytest.mark.parametrize(
    "name", ["my-images", "demo", "demo-gpu", "emoji64", "imagenet256-dip-xl", "imagenet512-dip-xl32"]
)
def test_packaged_recipes_train_at_tiny_size(name: str, tmp_path: Path, picture_folder: Path) -> None:
    recipe = load_recipe(name)
    check_recipe(recipe, world_size=8 if name.startswith("imagenet") else 1)
    tiny = tiny_recipe(tmp_path / "run", picture_folder)
    recipe.out, recipe.model = tiny.out, tiny.model
    recipe.data.source, recipe.data.resolution, recipe.data.in_memory = tiny.data.source, tiny.data.resolution, True
    recipe.training.steps, recipe.training.batch_size, recipe.training.compile = 2, 4, False
    recipe.data.label_column = tiny.data.label_column
    recipe.training.device, recipe.preview.every = "cpu", 2
    recipe.preview.images, recipe.preview.steps = 4, 2
    if recipe.alignment.weight:
        from .test_alignment import save_encoder  # needs transformers

        recipe.alignment.encoder, recipe.alignment.block = str(save_encoder(tmp_path / "encoder")), 2
    assert train(recipe, QUIET).step == 2


def test_imagenet_recipes_hold_the_releases_settings() -> None:
    recipe = load_recipe("imagenet256-dip-xl")
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.optimizer.weight_decay) == (1e-4, (0.9, 0.999), 1e-3)
    assert (recipe.optimizer.warmup_steps, recipe.optimizer.gradient_clip, recipe.training.ema_decay) == (
        0,
        None,
        0.9999,
    )
    assert (recipe.flow, recipe.training.batch_size) == (FlowSection(time_distribution="logit_normal"), 256)
    assert recipe.alignment == AlignmentSection(weight=0.5, block=8, encoder="facebook/dinov2-base")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"dpeth": 3}}, "model.dpeth is not a key of a recipe; perhaps model.depth"),
        ({"modle": {}}, "modle is not a key of a recipe; perhaps model"),
        ({"training": {"steps": "seven"}}, "training.steps: .*integer.*'seven'"),
        ({"training": {"steps": 0}}, "training.steps: .*found 0"),
        ({"flow": {"class_dropout": 1.5}}, "flow.class_dropout"),
        ({"data": {"resolution": [64]}}, "data.resolution"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule"),
        ({"data": None}, "data"),
        ([1], "expected sections"),
    ],
)
def test_recipes_with_mistakes(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_recipe(values)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"data": {"resolution": 60}, "model": {"patch_size": 8}}, 1, "60x60 pixels .* multiples of 8"),
        ({"preview": {"guidance_interval": [0.8, 0.2]}}, 1, "preview: "),
        ({"evaluation": {"guidance_interval": [0.8, 0.2]}}, 1, "evaluation: "),
        ({"training": {"batch_size": 6}}, 4, "batch_size 6 cannot be split over 4 processes"),
        ({"training": {"batch_size": 6, "gradient_accumulation": 4}}, 1, "multiple of 4"),
        ({"model": {"preset": "dip-xxl/16"}}, 1, "no preset"),
        ({"model": {"hidden_size": 30, "num_heads": 4}}, 1, "multiple of"),
    ],
)
def test_recipes_that_cannot_work(values: dict, processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_recipe(parse_recipe(values), processes)


def test_half_an_environment_of_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start with torchrun"):
        train(tiny_recipe(tmp_path / "run", "emoji"), QUIET)


def test_yaml_numbers_come_out_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("optimizer: {lr: 3e-4}\ndata: {resolution: [64, 96]}\n")
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.optimizer.lr == 3e-4 and recipe.data.resolution == (64, 96)
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_precision_follows_the_device() -> None:
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert choose_precision("auto", torch.device("mps")) == torch.float32
    assert Processes(0, 1, torch.device("cpu")).is_main


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


def test_metrics_against_whatever_the_training_accepts(tmp_path: Path, picture_folder: Path) -> None:
    """A broken file gives its place to the next one, small pictures are enlarged: as in training."""
    (picture_folder / "ant" / "2.png").write_bytes(b"broken")
    recipe = tiny_recipe(
        tmp_path / "run",
        picture_folder,
        data={"resolution": 64, "max_broken": 0.5},
        evaluation={"every": 6, "images": 4, "steps": 1, "metrics": ["kid_efficientnet", "boundary"]},
    )
    train(recipe, QUIET)
    assert '"event": "evaluation"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_metrics_that_cannot_be_had_stop_the_run_before_it_starts(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder, evaluation={"every": 2, "metrics": ["fidd"]})
    with pytest.raises(UserError, match="no metric 'fidd'"):
        train(recipe, QUIET)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("head", ["unet", "coordinate_mlp", "attention"])
def test_flops_need_no_computing(head: str) -> None:
    """What MFU goes by is counted on shapes alone, whatever the model's device, and is what a real pass takes."""
    model = DiP(patch_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=3, head=head)

    def counted(images: int) -> int:
        x, t, y = torch.randn(images, 3, 32, 32), torch.rand(images), torch.zeros(images, dtype=torch.long)
        with torch.no_grad():
            return count_flops(lambda: model(x, t, y))

    assert training_flops(model, 32, 32) == 3 * (counted(2) - counted(1))


def test_losses_are_what_they_were(tmp_path: Path) -> None:
    """Against a file, so that a change that moves all runs alike is seen, too."""
    expected = json.loads(make_losses.FILE.read_text(encoding="utf-8"))
    for prediction, found in make_losses.losses(tmp_path).items():
        torch.testing.assert_close(
            torch.tensor(found), torch.tensor(expected[prediction]), rtol=2e-4, atol=0, msg=prediction
        )
