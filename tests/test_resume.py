"""A run that was stopped, killed or asked for something else goes on exactly, or says why not."""

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixeldip import DiPPipeline, UserError
from pixeldip.recipe import parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import LOG, read_evaluations, read_events, read_metrics, training_rate
from pixeldip.training import learner, train, trainer
from pixeldip.training.preparation import check_resume

from .conftest import PATIENCE, QUIET, assert_same_state, newest_step, tiny_recipe

TRAIN = [sys.executable, "-m", "pixeldip.cli", "train"]


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


def test_a_reader_of_the_output_that_ends_stops_the_run_with_a_checkpoint(tmp_path: Path, picture_folder: Path) -> None:
    """As `| tee log` at Ctrl-C, which ends tee first."""
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training={"steps": 3000, "save_every": 3000})
    save_recipe(recipe, tmp_path / "r.yaml")
    command = [*TRAIN, str(tmp_path / "r.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "step 1/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == ""
    stopped = newest_step(tmp_path / "run")
    assert process.returncode == 141 and 1 < stopped < 3000
    end = json.loads((tmp_path / "run" / LOG).read_text().splitlines()[-1])
    assert (end["event"], end["step"], end["signal"]) == ("interrupted", stopped, signal.SIGPIPE)


def signal_in_step(step: int, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process gets these signals in a step of the next training, which has six."""
    draw, steps = learner.draw, iter(range(1, 7))

    def signalled(*arguments: object) -> tuple:
        if next(steps) == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return draw(*arguments)

    monkeypatch.setattr(learner, "draw", signalled)


@pytest.mark.parametrize(("step", "by"), [(2, signal.SIGTERM), (6, None)])
def test_a_signal_ends_the_run_with_the_step_that_it_came_in(
    step: int, by: int | None, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the next log is; in the last step it leaves nothing out."""
    signal_in_step(step, [signal.SIGTERM], monkeypatch)
    evaluation = {"every": 6, "images": 4, "steps": 1, "metrics": ["boundary"]}
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    training = {"log_every": 6, "save_every": 6}
    outcome = train(tiny_recipe(tmp_path / "run", picture_folder, training=training, evaluation=evaluation), QUIET)
    assert (outcome.step, outcome.interrupted_by) == (step, by) and newest_step(tmp_path / "run") == step
    assert [entry["step"] for entry in read_evaluations(tmp_path / "run")] == ([] if by else [6])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before  # of what comes next


@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_that_a_signal_left_out_is_the_first_thing_of_the_resumed_run(
    step: int, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"every": 2, "images": 4, "steps": 1, "metrics": ["boundary"]}
    straight, recipe = (tiny_recipe(tmp_path / name, picture_folder, evaluation=evaluation) for name in "ab")
    train(straight, QUIET)
    with monkeypatch.context() as patch:
        signal_in_step(step, [signal.SIGTERM], patch)
        assert train(recipe, QUIET).step == step
    assert [entry["step"] for entry in read_evaluations(tmp_path / "b")] == list(range(2, step, 2))
    train(recipe, QUIET)
    measured = [[(e["step"], e["metrics"]) for e in read_evaluations(tmp_path / name)] for name in "ab"]
    assert measured[0] == measured[1]


def test_the_evaluation_of_the_last_step_is_made_up_for(tmp_path: Path, picture_folder: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder)
    train(recipe, QUIET)
    recipe.evaluation = dataclasses.replace(recipe.evaluation, every=5, images=4, steps=1, metrics=("boundary",))
    recipe.data.in_memory, recipe.data.workers = False, 1
    for _ in range(2):
        assert train(recipe, QUIET).step == 6
    evaluations = read_events(tmp_path / "run", "evaluation")
    assert [entry["step"] for entry in evaluations] == [6] and newest_step(tmp_path / "run") == 6


def test_ctrl_c_again_some_seconds_later_does_not_wait_for_a_checkpoint(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training={"save_every": 2})
    with monkeypatch.context() as patch:
        signal_in_step(4, [signal.SIGINT, signal.SIGINT], patch)
        patch.setattr(trainer, "IMPATIENT_SECONDS", 0)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, QUIET)
    assert newest_step(tmp_path / "run") < 4 and signal.getsignal(signal.SIGINT) == before
    assert train(recipe, QUIET).step == 6


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


def test_a_start_over_leaves_nothing_of_another_network(
    tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    preview = {"every": 2, "images": 2, "steps": 1}
    recipe = tiny_recipe(tmp_path / "run", picture_folder, training={"steps": 4, "save_every": 2}, preview=preview)
    train(recipe, QUIET)
    old = (tmp_path / "run" / "previews" / "step-00000004.png").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "environment.json").write_text("{}")
    sections = {"training": {"steps": 2}, "preview": {**preview, "every": 0}, "flow": {"class_dropout": 0.0}}
    train(tiny_recipe(tmp_path / "run", picture_folder, model={"hidden_size": 64}, **sections))
    assert "preview.guidance to 1" in capsys.readouterr().out  # without dropout nothing trains what it steers away from
    DiPPipeline.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "samples.png").exists()
    assert (tmp_path / "run" / "previews-before-1" / "step-00000004.png").read_bytes() == old
    assert "command" in json.loads((tmp_path / "run" / "environment.json").read_text())


def test_a_rate_that_more_steps_throw_up_is_told(
    tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of a cosine, and after a cooldown; not where the rate goes on as it was."""
    for name, optimizer in {"a": {"schedule": "cosine"}, "b": {"schedule": "constant", "cooldown_steps": 3}}.items():
        recipe = tiny_recipe(tmp_path / name, picture_folder, optimizer={**optimizer, "warmup_steps": 0, "lr": 0.01})
        train(recipe, QUIET)
        recipe.training.steps = 12
        train(recipe)
        was, now = {"a": ("0.00076", "0.005"), "b": ("0.0033", "0.01")}[name]
        told = (
            f"warning: the learning rate was {was} at step 6 of 6, and goes on at {now}: it follows the schedule of 12"
        )
        assert told in capsys.readouterr().out
    recipe = tiny_recipe(tmp_path / "c", picture_folder, optimizer={"schedule": "constant"})
    train(recipe, QUIET)
    recipe.training.steps, recipe.optimizer.cooldown_steps = 9, 3
    train(recipe)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of the values, which are of no right type
def test_what_a_resume_may_change(tmp_path: Path) -> None:
    """How long a run goes on, where, and how it is watched; nothing that enters what is computed."""
    may_change = {
        *("out", "preview", "evaluation", "logging", "optimizer.cooldown_steps"),
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
        return {"step": step, "loss": loss, "images_per_second": float(step**2)}

    entries = [*(line(step, 1.0) for step in range(1, 7)), {"event": "start", "step": 3}, line(4, 9.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 9.0)]
    assert training_rate(tmp_path) == (4 + 9) / 2  # the median
