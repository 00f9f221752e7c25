"""Kills a training run at random moments with SIGKILL and resumes it; it must end bit for bit as a run left alone.

    python benchmarks/faults/kill_and_resume.py [--kills 50] [--seed 0]
    python benchmarks/faults/kill_and_resume.py --minutes 60 [--between 120]

Half of the kills are aimed at the writing of a checkpoint. With --minutes the run is killed every so many seconds,
drawn up to twice --between, for as long as that, and the run left alone goes on beside it. Prints where each kill fell
and a JSON line; the exit status is 1 if a tensor or a logged loss differs. CPU, fp32, a thread for each run.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pixeldip import DiPPipeline, __version__
from pixeldip.recipe import parse_recipe, save_recipe
from pixeldip.run_folder import CHECKPOINTS, TRAINING_STATE, newest_checkpoint, read_metrics, step_of

FOREVER = 10**9  # steps; the learning rate is constant, so where a run ends changes nothing before it


def recipe(out: Path, steps: int):
    return parse_recipe(
        {
            "out": str(out),
            "data": {"source": "emoji", "resolution": 16, "flip": True},
            "model": {"patch_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 2, "head_width": 16},
            "training": {
                "steps": steps,
                "batch_size": 8,
                "precision": "fp32",
                "device": "cpu",
                "log_every": 1,
                "save_every": 7,
            },
            "optimizer": {"schedule": "constant"},
            "preview": {"every": 0},
        }
    )


def start(run: Path, steps: int) -> subprocess.Popen:
    path = run.with_name(f"{run.name}-{steps}.yaml")
    save_recipe(recipe(run, steps), path)
    return subprocess.Popen(
        [sys.executable, "-m", "pixeldip.cli", "train", str(path)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def to_the_end(run: Path, steps: int) -> None:
    if start(run, steps).wait():
        raise SystemExit(f"{run.name}: the run to the end failed")


def stop_beyond(step: int, run: Path, process: subprocess.Popen) -> int:
    """Lets a run come to a step and ends it in order; the step of its last checkpoint."""
    while process.poll() is None and newest_step(run) <= step:
        time.sleep(1)
    process.terminate()
    if process.wait() != 143:
        raise SystemExit(f"{run.name}: ended with status {process.returncode}")
    return newest_step(run)


def reached(run: Path) -> int:
    metrics = read_metrics(run)
    return int(metrics[-1]["step"]) if metrics else 0


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = load_file(newest_checkpoint(run) / TRAINING_STATE / "state.safetensors")
    ema = DiPPipeline.from_pretrained(str(run)).model.state_dict()
    return found | {f"ema.{name}": value for name, value in ema.items()}


def newest_step(run: Path) -> int:
    checkpoint = newest_checkpoint(run)
    return step_of(checkpoint) if checkpoint else 0


def being_written(run: Path) -> bool:
    return any(step_of(Path(path.name.removeprefix("partial-"))) > newest_step(run) for path in partials(run))


def partials(run: Path) -> list[Path]:
    return list((run / CHECKPOINTS).glob("partial-*"))


def kill_once(run: Path, dice: random.Random, seconds: float | None) -> dict:
    """Starts or resumes the run and kills it: after some time, or at a step, or while a checkpoint is written."""
    goal = newest_step(run) + dice.randint(1, 40)
    aimed = dice.random() < 0.5
    process = start(run, FOREVER)
    if seconds is None:
        while process.poll() is None and reached(run) < goal:
            time.sleep(0.002)
        while process.poll() is None and aimed and not being_written(run):
            time.sleep(0.0002)
        time.sleep(dice.random() * 0.05)
    else:
        time.sleep(seconds)
    if process.poll() is not None:
        raise SystemExit(f"the run ended by itself with status {process.returncode}")
    process.kill()
    process.wait()
    fell = "writing a checkpoint" if being_written(run) else "deleting an old one" if partials(run) else "training"
    return {"killed_at_step": reached(run), "newest_checkpoint": newest_step(run), "while": fell}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--between", type=float, default=120, help="mean seconds between kills, with --minutes")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as at_end:
        alone, killed = (Path(folder) / name for name in ("alone", "killed"))
        if arguments.minutes is not None:
            beside = start(alone, FOREVER)
            at_end.callback(beside.kill)
        fell: list[dict] = []
        while len(fell) < arguments.kills if arguments.minutes is None else minutes_since(began) < arguments.minutes:
            seconds = None if arguments.minutes is None else 10 + dice.random() * 2 * (arguments.between - 10)
            fell.append(kill_once(killed, dice, seconds))
            print(f"{minutes_since(began):.1f} min: {fell[-1]}", flush=True)
        if arguments.minutes is None:
            steps = newest_step(killed) + 10
            to_the_end(alone, steps)
        else:
            steps = stop_beyond(newest_step(killed), alone, beside)
        to_the_end(killed, steps)
        ours, theirs = tensors(killed), tensors(alone)
        different = [n for n in theirs if n not in ours or not torch.equal(ours[n], theirs[n])]
        losses = [[(entry["step"], entry["loss"]) for entry in read_metrics(run)] for run in (killed, alone)]
    lost = [kill["killed_at_step"] - kill["newest_checkpoint"] for kill in fell]
    places = sorted({kill["while"] for kill in fell})
    record = {
        "benchmark": "kill_and_resume",
        "pixeldip": __version__,
        "torch": torch.__version__,
        "steps": steps,
        "save_every": recipe(alone, steps).training.save_every,
        "minutes": round(minutes_since(began), 1),
        "kills": len(fell),
        "fell_while": {place: sum(kill["while"] == place for kill in fell) for place in places},
        "steps_lost": {"most": max(lost), "median": statistics.median(lost)},
        "tensors_compared": len(theirs),
        "tensors_different": len(different),
        "losses_compared": len(losses[1]),
        "losses_different": len(set(losses[0]) ^ set(losses[1])),
    }
    print(json.dumps(record))
    return 1 if record["tensors_different"] or record["losses_different"] else 0


def minutes_since(began: float) -> float:
    return (time.perf_counter() - began) / 60


if __name__ == "__main__":
    sys.exit(main())
