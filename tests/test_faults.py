"""What a run meets on machines that fail: damage, a second run, other images, divergence, full disks, killed ranks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pixeldip import DiPPipeline, UserError
from pixeldip.data import Batches, EpochOrder, PositionSampler, TrainingImages, changes, fingerprint, open_source
from pixeldip.processes import Processes
from pixeldip.recipe import Recipe, TrainingSection, parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import checkpoints, read_events, read_metrics
from pixeldip.training import learner, train
from pixeldip.training.checkpoint import Checkpoints
from pixeldip.training.divergence import Watch, spreading
from pixeldip.training.ema import EMA
from pixeldip.training.failures import explaining_failures
from pixeldip.training.preparation import build_model
from pixeldip.training.progress import SLOW_IMAGES
from pixeldip.training.run_lock import only_run

from .conftest import PATIENCE, QUIET, assert_same_state, largest_file, make_picture, saved_state, tiny_recipe

CPU = Processes(0, 1, torch.device("cpu"))


def copied(recipe: Recipe, out: Path, steps: int) -> Recipe:
    """The same run, further on and in another folder, with the checkpoints it has."""
    shutil.copytree(recipe.out, out)
    again = parse_recipe({**recipe_values(recipe), "out": str(out)})
    again.training.steps = steps
    return again


@pytest.fixture
def trained(tmp_path: Path, picture_folder: Path) -> Recipe:
    """A run of six steps with checkpoints after three and six; its rate does not depend on where it ends."""
    recipe = tiny_recipe(tmp_path / "run", picture_folder, optimizer={"schedule": "constant"})
    train(recipe, QUIET)
    return recipe


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["state/state.safetensors", "pipeline/model/diffusion_pytorch_model.safetensors"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    damage: Callable[[Path], None], file: str, trained: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, hurt = copied(trained, tmp_path / "straight", 8), copied(trained, tmp_path / "hurt", 8)
    train(straight, QUIET)
    damage(tmp_path / "hurt" / "checkpoints" / "step-00000006" / file)
    train(hurt)
    assert_same_state(tmp_path / "straight", tmp_path / "hurt")
    assert f"warning: step-00000006 is damaged: {file}" in capsys.readouterr().out
    assert (tmp_path / "hurt" / "checkpoints" / "damaged-step-00000006").is_dir()
    start = read_events(tmp_path / "hurt", "start")[-1]
    assert start["resumed_from"] == "step-00000003" and file.split("/")[-1] in start["damaged"][0]
    assert [entry["step"] for entry in read_metrics(tmp_path / "hurt")] == list(range(1, 9))


def test_without_a_sound_checkpoint_nothing_is_touched(trained: Recipe) -> None:
    run = Path(trained.out)
    for folder in checkpoints(run):
        flip_a_bit(folder / "state" / "state.safetensors")
    trained.training.steps = 8
    with pytest.raises(UserError, match=r"no checkpoint to go on from \(step-00000006 is damaged.*step-00000003"):
        train(trained, QUIET)
    assert [folder.name for folder in checkpoints(run)] == ["step-00000003", "step-00000006"]


def test_a_checkpoint_without_its_model(trained: Recipe) -> None:
    shutil.rmtree(Path(trained.out) / "checkpoints" / "step-00000006" / "pipeline")
    with pytest.raises(
        UserError, match=r"step-00000006: without its pipeline/ folder, which holds the model; put that"
    ):
        DiPPipeline.from_pretrained(trained.out)


def test_one_run_in_a_folder(trained: Recipe) -> None:
    trained.training.steps = 8
    with (
        only_run(Path(trained.out)),
        pytest.raises(UserError, match=rf"going on in this folder \(process {os.getpid()} on "),
    ):
        train(trained, QUIET)
    assert train(trained, QUIET).step == 8


def test_images_that_came_or_went_are_told_and_accepted_by_choice(
    trained: Recipe, picture_folder: Path, tmp_path: Path
) -> None:
    trained.training.steps = 8
    make_picture(99).save(picture_folder / "bee" / "new.png")
    with pytest.raises(UserError, match=r"1 image more \(12, now 13\), bee 6, now 7.*--data.accept-changes"):
        train(trained, QUIET)
    (picture_folder / "bee" / "new.png").unlink()
    picture = (picture_folder / "ant" / "0.png").rename(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"1 image fewer \(12, now 11\), ant 6, now 5"):
        train(trained, QUIET)
    picture.rename(picture_folder / "ant" / "renamed.png")
    with pytest.raises(UserError, match="as many images, but other names, sizes or order"):
        train(trained, QUIET)
    trained.data.accept_changes = True
    train(trained, QUIET)
    assert "other names" in read_events(Path(trained.out), "start")[-1]["data_changed"]
    trained.training.steps, trained.data.accept_changes = 9, False
    train(trained, QUIET)  # what was accepted is what counts from then on
    (picture_folder / "cow").mkdir()
    make_picture(98).save(picture_folder / "cow" / "0.png")
    trained.training.steps, trained.data.accept_changes = 10, True
    with pytest.raises(
        UserError, match=r"with the new classes cow; .* has other classes. Start another run .*--model.pretr"
    ):
        train(trained, QUIET)
    shutil.rmtree(picture_folder / "cow")
    (picture_folder / "ant").rename(picture_folder / "cow")  # bee would go on as what was ant
    with pytest.raises(UserError, match=r"without the classes ant, with the new classes cow; .* has other classes"):
        train(trained, QUIET)


@pytest.mark.parametrize("damaged", ["", "{}", "[]", "null"])
def test_a_damaged_record_of_the_images(trained: Recipe, damaged: str) -> None:
    (Path(trained.out) / "data.json").write_text(damaged)
    trained.training.steps = 8
    with pytest.raises(UserError, match=r"data.json: damaged; delete it to go on, if you are sure that the images"):
        train(trained, QUIET)
    (Path(trained.out) / "data.json").unlink()
    assert train(trained, QUIET).step == 8 and json.loads((Path(trained.out) / "data.json").read_text())["images"] == 12


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("recipe.yaml", "recipe.yaml is gone: the settings are not compared"),
        ("data.json", "data.json is gone: the images are not compared"),
        ("checkpoints", "run: no checkpoint of its 6 steps; it starts from the beginning"),
    ],
)
def test_what_is_gone_of_a_run_is_told(gone: str, told: str, trained: Recipe, capsys: pytest.CaptureFixture) -> None:
    trained.training.steps = 8
    (Path(trained.out) / gone).rename(Path(trained.out).parent / gone)
    train(trained)
    assert told in capsys.readouterr().out
    trained.training.steps = 9
    train(trained)
    assert "warning" not in capsys.readouterr().out


def test_a_sound_checkpoint_of_other_settings_is_not_to_be_deleted(trained: Recipe) -> None:
    (Path(trained.out) / "recipe.yaml").unlink()
    trained.training.steps, trained.model.depth = 8, 3
    with pytest.raises(
        UserError, match=r"step-00000006: cannot resume .*\. Its files are as they were written: give the"
    ):
        train(trained, QUIET)


def test_images_that_moved_are_the_same(trained: Recipe, picture_folder: Path, tmp_path: Path) -> None:
    straight, moved = copied(trained, tmp_path / "a", 8), copied(trained, tmp_path / "b", 8)
    train(straight, QUIET)
    moved.data.source = str(shutil.copytree(picture_folder, tmp_path / "elsewhere", copy_function=shutil.copyfile))
    train(moved, QUIET)
    assert_same_state(tmp_path / "a", tmp_path / "b")


def test_a_fingerprint_sees_which_image_is_of_which_class(tmp_path: Path) -> None:
    """In a table, where no name says so: as many of each class."""
    rows, found = open_source(tiny_recipe(Path("x"), "emoji").data).rows, []
    for name, labels in {"a": [0, 1, 1], "b": [1, 0, 1]}.items():
        table = rows.select(range(3)).remove_columns("label").add_column("label", labels)
        table.to_parquet(tmp_path / f"{name}.parquet")
        found.append(fingerprint(open_source(tiny_recipe(Path("x"), tmp_path / f"{name}.parquet").data)))
    assert found[0]["classes"] == found[1]["classes"] == {"0": 1, "1": 2}
    assert changes(*found) == "as many images, but other names, sizes or order"


def test_a_fingerprint_sees_what_a_file_holds_by_its_size(picture_folder: Path) -> None:
    recipe = tiny_recipe(Path("x"), picture_folder)
    before = fingerprint(open_source(recipe.data))
    assert before["images"] == 12 and before["classes"] == {"ant": 6, "bee": 6}
    assert before["bytes"] == sum(path.stat().st_size for path in picture_folder.rglob("*.png"))
    make_picture(77, 20, 20).save(picture_folder / "ant" / "3.png")
    assert fingerprint(open_source(recipe.data))["sha256"] != before["sha256"]
    bundled = fingerprint(open_source(tiny_recipe(Path("x"), "emoji").data))
    assert bundled["images"] == 40 and len(bundled["classes"]) == 10 and bundled["bytes"] > 40_000


@pytest.fixture
def bad_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the noise of a step (from 1) infinite, as a fault of the hardware might."""

    def inject(*steps: int) -> None:
        def draw(section, objective, batch, *rest):
            labels, noise, t = real(section, objective, batch, *rest)
            if batch.positions[0] // 4 + 1 in steps:
                noise[0, 0, 0, 0] = math.inf
            return labels, noise, t

        monkeypatch.setattr(learner, "draw", draw)

    real = learner.draw
    return inject


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in saved_state(folder).items() if name.startswith("network.")}


def test_a_step_that_diverges_stops_the_run_and_never_reaches_the_weights(
    tmp_path: Path, picture_folder: Path, bad_step: Callable[[int], None]
) -> None:
    """Also where the next log comes much later, and the step is one that saves."""
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training={"log_every": 5})
    bad_step(3)
    with pytest.raises(
        UserError,
        match=r"step 3 diverged: loss (inf|nan), .*on-divergence skip, .* starts from the beginning, for want",
    ):
        train(recipe, QUIET)
    assert not checkpoints(tmp_path / "run")
    (event,) = read_events(tmp_path / "run", "divergence")
    order = EpochOrder(12, recipe.training.seed)
    assert event["step"] == 3 and event["rows"] == [order[position][1] for position in (8, 9, 10, 11)]
    assert event["loss"] in ("inf", "nan")
    assert read_events(tmp_path / "run", "failed")


def test_a_step_that_diverges_is_skipped(tmp_path: Path, picture_folder: Path, bad_step: Callable[[int], None]) -> None:
    sections = {"training": {"on_divergence": "skip", "save_every": 1, "keep_last": 9, "gradient_accumulation": 2}}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, **sections)
    bad_step(4)
    train(recipe, QUIET)
    folders = checkpoints(tmp_path / "run")
    third, fourth, last = (weights(folders[step - 1]) for step in (3, 4, 6))
    assert all(torch.equal(third[name], fourth[name]) for name in third)
    assert all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(third[name], last[name]) for name in third)
    steps = {int(value) for name, value in saved_state(folders[-1]).items() if name.endswith(".step")}
    assert steps == {5}
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 5, 6]


def test_steps_are_skipped_only_so_often_in_a_row(
    tmp_path: Path, picture_folder: Path, bad_step: Callable[[int], None]
) -> None:
    policy = {"on_divergence": "skip", "skip_limit": 2}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training=policy)
    bad_step(2, 4, 5)
    with pytest.raises(UserError, match=r"step 5 diverged.* 2 steps in a row were left out"):
        train(recipe, QUIET)
    exploding = tiny_recipe(tmp_path / "other", picture_folder, training={"gradient_limit": 1e-6})
    with pytest.raises(UserError, match=r"step 1 diverged: loss [0-9.]+, gradient norm [0-9.]+"):
        train(exploding, QUIET)


def test_a_loss_that_is_not_finite_shows_in_the_gradient() -> None:
    x = torch.tensor([2.0, 1e30], requires_grad=True)
    spreading((x**2).mean()).backward()
    assert x.grad.isnan().all()
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    spreading((x**2).mean()).backward()
    assert x.grad.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("fused", [True, False])  # not where a device has no such kernel
def test_only_a_sound_step_is_taken(fused: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    watch, moved = Watch(TrainingSection(gradient_limit=5.0), EpochOrder(4, seed=0), CPU), []
    for step, norm in enumerate((1.0, math.nan, math.inf, 5.1, 5.0)):
        before, weight.grad = weight.item(), torch.ones(1)
        watch.step(step, optimizer, torch.tensor(norm))
        moved.append(weight.item() != before)
    assert moved == [True, False, False, False, True]


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_that_are_not_finite_are_not_saved(averaged: bool, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", "emoji")
    model = build_model(recipe.model, 3, 0)
    ema, optimizer = EMA(model, 0.9), torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        next((ema.model if averaged else model).parameters()).flatten()[0] = math.nan
    alone = Processes(0, 1, torch.device("cpu"))
    saved = Checkpoints(tmp_path / "run", model, ema, optimizer, {"height": 16, "width": 16}, 2, alone)
    with pytest.raises(UserError, match="no longer finite, and were not saved"):
        saved.save(1, ema.model)
    assert not checkpoints(tmp_path / "run")


def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(trained: Recipe, tmp_path: Path) -> None:
    straight = copied(trained, tmp_path / "straight", 12)
    train(straight, QUIET)
    trained.training.steps = 12
    run = Path(trained.out)
    largest = max(path.stat().st_size for path in run.rglob("*.safetensors"))
    message = r"step-00000009: could not be written \(.*\); earlier checkpoints are intact.* goes on from the last"
    with largest_file(largest // 2), pytest.raises(UserError, match=message):
        train(trained, QUIET)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    train(trained, QUIET)
    assert_same_state(tmp_path / "straight", run)


def test_half_a_line_of_the_metrics_swallows_nothing(trained: Recipe) -> None:
    path = Path(trained.out) / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 7, "loss": 0.')
    trained.training.steps = 8
    train(trained, QUIET)
    assert path.read_text().startswith(before)
    starts = read_events(Path(trained.out), "start")
    assert [start["resumed_from"] for start in starts] == [None, "step-00000006"]
    assert all(start["host"] and start["command"] and start["data"] == starts[0]["data"] for start in starts)
    assert [entry["step"] for entry in read_metrics(Path(trained.out))] == list(range(1, 9))
    data = json.loads((Path(trained.out) / "data.json").read_text())
    assert data["sha256"] == starts[0]["data"] and data["images"] == 12


@pytest.mark.parametrize(("batch_size", "passes", "at_once", "advised"), [(12, 1, 12, 2), (36, 4, 9, 12)])
def test_out_of_memory_names_what_would_fit(
    batch_size: int, passes: int, at_once: int, advised: int, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, "emoji", training={"batch_size": batch_size, "gradient_accumulation": passes})
    told = rf"{at_once} images at once in each of 1 processes; give --training.gradient-accumulation {advised} "
    with (
        pytest.raises(UserError, match=f"{told}.* starts from the beginning"),
        explaining_failures(recipe, CPU),
    ):
        torch.empty(2**50)


class Dying(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> int:
        os.kill(os.getpid(), 9)


def test_a_data_worker_that_is_killed_is_named(tmp_path: Path) -> None:
    loader = DataLoader(Dying(), num_workers=1, multiprocessing_context="fork")
    with (
        pytest.raises(UserError, match="a process that reads images died"),
        explaining_failures(tiny_recipe(tmp_path, "x"), CPU),
    ):
        next(iter(loader))


def test_slow_storage_is_told(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    decode = TrainingImages._decode

    def slowly(images: TrainingImages, index: int) -> tuple[np.ndarray, int]:
        time.sleep(0.1)
        return decode(images, index)

    monkeypatch.setattr(TrainingImages, "_decode", slowly)
    data = {"in_memory": False, "workers": 0}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, data=data, training={"steps": 2, "log_every": 1})
    train(recipe)
    first, last = read_metrics(tmp_path / "run")
    assert 4 / (last["seconds"] - first["seconds"]) == pytest.approx(last["images_per_second"], rel=0.05)
    assert SLOW_IMAGES < last["waiting_for_images"] <= 1
    *_, told = re.findall(r"waiting for images (\d+)%", capsys.readouterr().out)
    assert abs(int(told) / 100 - last["waiting_for_images"]) < 0.006  # each is rounded for itself


def test_storage_that_hangs_is_named(tmp_path: Path, picture_folder: Path) -> None:
    """As it does to the process that reads: it is stopped here."""
    recipe = tiny_recipe(tmp_path, picture_folder, data={"in_memory": False, "workers": 1, "timeout": 1})
    images, others = TrainingImages(open_source(recipe.data), recipe.data, seed=0), active_children()
    batches = Batches(images, PositionSampler(4, 0, 1, 1, 0, 1), pin_memory=False)
    (reader,) = set(active_children()) - set(others)
    os.kill(reader.pid, signal.SIGSTOP)
    waited_enough = threading.Timer(60, reader.kill)
    waited_enough.start()
    message = f"no batch came within data.timeout = 1 s: is {picture_folder} still reachable"
    try:
        with pytest.raises(UserError, match=message), explaining_failures(recipe, CPU):
            next(batches)
    finally:
        waited_enough.cancel()
        os.kill(reader.pid, signal.SIGCONT)


def test_a_killed_process_ends_the_others_and_a_restart_carries_on(tmp_path: Path, picture_folder: Path) -> None:
    alone = tiny_recipe(tmp_path / "one", picture_folder, training={"steps": 60})
    train(alone, QUIET)
    recipe = parse_recipe({**recipe_values(alone), "out": str(tmp_path / "two")})
    save_recipe(recipe, tmp_path / "two.yaml")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "--max-restarts",
        "1",
    ]
    launch += ["-m", "pixeldip.cli", "train", str(tmp_path / "two.yaml")]
    process = subprocess.Popen(
        launch,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not checkpoints(tmp_path / "two") and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    starts = read_events(tmp_path / "two", "start")
    assert len(starts) == 2 and starts[1]["resumed_from"] and starts[1]["processes"] == 2
    losses = [[entry["loss"] for entry in read_metrics(tmp_path / run)] for run in ("one", "two")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
