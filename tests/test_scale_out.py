"""Many processes compute what one does, however the model lies on them. Real processes, over gloo."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pixeldip import DiP, DiPPipeline, UserError
from pixeldip.cli import main
from pixeldip.processes import Processes
from pixeldip.recipe import Recipe, parse_recipe, recipe_values, save_recipe
from pixeldip.run_folder import newest_checkpoint, read_events, read_metrics
from pixeldip.training import train
from pixeldip.training.learner import Learner
from pixeldip.training.preparation import check_recipe

from .conftest import PATIENCE, QUIET, TINY_MODEL, make_picture, saved_state, tiny_recipe

STEPS = 8
LAUNCHER, PIXELDIP = ["-m", "torch.distributed.run"], ["-m", "pixeldip.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


PRECISIONS = """
import os, sys, torch
from pathlib import Path
from pixeldip import processes
rank, chosen = int(os.environ["RANK"]), []
for fast in (0, 1):
    processes._multiplies_faster_in_bf16 = lambda: rank == fast
    with processes.start_processes("cpu") as group:
        chosen.append(processes.precision_name(processes.choose_precision("auto", group.device)))
Path(sys.argv[1], str(rank)).write_text(" ".join(chosen))
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    for k, name in enumerate(("ant", "bee")):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            make_picture(10 * k + i).save(folder / "pictures" / name / f"{i}.png")
    training = {"steps": STEPS, "batch_size": 8, "save_every": 4}
    preview = {"every": STEPS, "images": 4, "steps": 2}
    optimizer = {"schedule": "constant"}  # how long a run is to be must not matter before its end
    recipe = tiny_recipe(folder / "run", folder / "pictures", training=training, preview=preview, optimizer=optimizer)
    train(recipe, QUIET)
    return recipe


def launch(
    recipe: Recipe, out: Path, processes: int, before: str = "true", **training: object
) -> subprocess.CompletedProcess:
    """The recipe in another folder, on several processes of a shell in which `before` was run."""
    values = recipe_values(recipe)
    changed = parse_recipe({**values, "out": str(out), "training": {**values["training"], **training}})
    file = out.with_suffix(".yaml")
    save_recipe(changed, file)
    return torchrun(processes, "train", str(file), before=before)


def torchrun(processes: int, *arguments: str, before: str = "true") -> subprocess.CompletedProcess:
    launcher = [*LAUNCHER, "--nproc-per-node", str(processes), "--standalone", *PIXELDIP]
    command = ["bash", "-c", f'{before} && exec "$0" "$@"', sys.executable, *launcher, *arguments]
    return subprocess.run(command, env=ONE_THREAD, timeout=PATIENCE, capture_output=True, text=True)


def losses(run: str | Path) -> torch.Tensor:
    return torch.tensor([[entry["loss"], entry["gradient_norm"]] for entry in read_metrics(Path(run))])


def assert_as_alone(run: Path, alone: Recipe) -> None:
    assert losses(run).shape == (STEPS, 2)
    torch.testing.assert_close(losses(run), losses(alone.out), rtol=1e-5, atol=0)
    ours, theirs = (DiPPipeline.from_pretrained(name).model.state_dict() for name in (run, alone.out))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_all_compute_in_what_is_faster_on_the_main_ones_machine(tmp_path: Path) -> None:
    script, found = tmp_path / "precisions.py", tmp_path / "found"
    script.write_text(PRECISIONS)
    found.mkdir()
    command = [sys.executable, *LAUNCHER, "--nproc-per-node", "2", "--standalone", str(script), str(found)]
    subprocess.run(command, env=ONE_THREAD, timeout=PATIENCE, check=True)
    assert [(found / rank).read_text() for rank in "01"] == ["bfloat16 float32"] * 2


@pytest.mark.parametrize("processes, shard", [(4, True), (2, False)])
def test_several_train_as_one(processes: int, shard: bool, alone: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(alone, run, processes, shard=shard, gradient_accumulation=2)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and done.stdout.count("sample it: ") == 1
    assert_as_alone(run, alone)
    assert len(list((run / "previews").iterdir())) == 1
    checkpoint = newest_checkpoint(run)
    parts = sorted((checkpoint / "state").iterdir())
    assert len(parts) == (processes if shard else 1)
    if not shard:
        state = saved_state(newest_checkpoint(Path(alone.out)))
        for name, value in saved_state(checkpoint).items():
            torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-5, msg=name)
    else:  # each holds its share: of equal parts, but for what cannot be cut evenly
        sizes = [sum(value.numel() for value in load_file(part).values()) for part in parts]
        assert max(sizes) < 1.2 * sum(sizes) / processes


def test_in_bf16_parts_are_as_near_as_the_whole_is(alone: Recipe, tmp_path: Path) -> None:
    assert launch(alone, tmp_path / "run", 2, shard=True, precision="bf16").returncode == 0
    torch.testing.assert_close(losses(tmp_path / "run"), losses(alone.out), rtol=0.03, atol=0)
    assert not torch.equal(losses(tmp_path / "run"), losses(alone.out))


def test_a_run_goes_on_with_other_processes(alone: Recipe, tmp_path: Path) -> None:
    """Four sharded, then two sharded, then one, then two whole: as one all along."""
    run, step = tmp_path / "run", 0
    for processes, shard in ((4, True), (2, True), (1, False), (2, False)):
        step += 2
        done = launch(alone, run, processes, shard=shard, steps=step)
        assert done.returncode == 0, done.stderr
        assert read_events(run, "start")[-1]["step"] == step - 2
    assert [start["processes"] for start in read_events(run, "start")] == [4, 2, 1, 2]
    assert_as_alone(run, alone)


def test_a_sharded_checkpoint_that_cannot_be_written(alone: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    weights = newest_checkpoint(Path(alone.out)) / "pipeline" / "model" / "diffusion_pytorch_model.safetensors"
    # a part holds 3/2 of the weights, and is written while the training goes on
    blocks = int(1.25 * weights.stat().st_size / 1024)
    failed = launch(alone, run, 2, before=f"ulimit -f {blocks}", shard=True)
    assert failed.returncode != 0
    assert (
        "could not be written (File too large); put it right, and the same command starts from the beginning"
        in failed.stderr
    )
    assert newest_checkpoint(run) is None
    assert launch(alone, run, 2, shard=True).returncode == 0
    assert_as_alone(run, alone)


def test_adapters_are_not_sharded(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", "emoji", model={"lora_rank": 2, "pretrained": "x/y"})
    recipe.training.shard = True
    with pytest.raises(UserError, match="without sharding"):
        check_recipe(recipe, 1, None)


def test_broken_images_are_counted_over_all_processes(tmp_path: Path) -> None:
    """Two of twelve, one in the share of each."""
    for i in range(12):
        path = tmp_path / "pictures" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        make_picture(i).save(path)
        if i in (3, 8):
            path.write_bytes(path.read_bytes()[:100])
    data = {"in_memory": False, "workers": 0, "max_broken": 0.1}
    recipe = tiny_recipe(tmp_path / "x", tmp_path / "pictures", data=data, training={"steps": STEPS, "log_every": 2})
    done = launch(recipe, tmp_path / "run", 2)
    assert done.returncode != 0 and "2 of 12 images cannot be read, more than data.max_broken = 0.1" in done.stderr
    recipe.data.max_broken = 0.2
    done = launch(recipe, tmp_path / "other", 2)
    assert done.returncode == 0, done.stderr
    assert all(done.stdout.count(f"{i:02}.png") == 1 for i in (3, 8))


def test_compiled_blocks_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    compiling = functools.partialmethod(DiP.compile_repeated_blocks, backend=backend)
    monkeypatch.setattr(DiP, "compile_repeated_blocks", compiling)
    recipe = tiny_recipe(tmp_path / "run", tmp_path, training={"compile": True})
    model = DiP(**{**TINY_MODEL, "hidden_size": 192, "depth": 1})  # larger than the first bucket, of 1 MiB
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        network = Learner(recipe, model, Processes(0, 2, torch.device("cpu")))._parallel
        network(torch.randn(1, 3, 16, 16), torch.rand(1), torch.zeros(1, dtype=torch.long))
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 1


def test_a_signal_to_torchrun_saves(alone: Recipe, tmp_path: Path) -> None:
    values = recipe_values(alone)
    training = {**values["training"], "steps": 5000, "save_every": 5000}
    save_recipe(parse_recipe({**values, "out": str(tmp_path / "run"), "training": training}), tmp_path / "run.yaml")
    command = [*LAUNCHER, "--nproc-per-node", "2", "--standalone", *PIXELDIP, "train", str(tmp_path / "run.yaml")]
    with subprocess.Popen([sys.executable, *command], env=ONE_THREAD, stderr=subprocess.PIPE, text=True) as process:
        try:
            while len(read_metrics(tmp_path / "run")) < 5 and process.poll() is None:
                time.sleep(0.05)
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1, errors
    (stopped,) = read_events(tmp_path / "run", "interrupted")
    assert newest_checkpoint(tmp_path / "run").name == f"step-{stopped['step']:08d}" and stopped["step"] < 5000


def test_a_sweep_on_two_processes_gives_the_numbers_of_one(alone: Recipe, tmp_path: Path) -> None:
    model, real = alone.out, alone.data.source
    flags = ["--images", "9", "--evaluations", "2", "--guidance", "1", "3", "--device", "cpu", "--no-cache"]
    flags += ["--metrics", "kid_efficientnet", "boundary", "--precision", "fp32"]
    common = ["sweep", model, "--reference", real, *flags, "--allow-resolution-mismatch"]
    done = torchrun(2, *common, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert main([*common, "--out", str(tmp_path / "one")]) == 0
    for file in (tmp_path / "one" / "settings").glob("*.json"):
        one, two = (json.loads(path.read_text()) for path in (file, tmp_path / "two" / "settings" / file.name))
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3), file.name


def test_a_study_on_two_processes(tmp_path: Path) -> None:
    """Every training and measurement is a group of its own; the folder is the main process's."""
    flags = ["--resolution", "32", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "study")]
    done = torchrun(2, "study", "overfit", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done; open") == 1 and (tmp_path / "study" / "report.html").is_file()
