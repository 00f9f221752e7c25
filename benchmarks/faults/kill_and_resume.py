"""Kills a training run at random moments with SIGKILL and resumes it; it must end bit for bit as a run left alone.

    python benchmarks/faults/kill_and_resume.py [--kills 10] [--seed 0]

Prints where each kill fell and a JSON line; the exit status is 1 if a tensor differs. CPU, fp32.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pixeldip import DiPPipeline, __version__
from pixeldip.recipe import parse_recipe, save_recipe
from pixeldip.run_folder import TRAINING_STATE, newest_checkpoint, read_metrics


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
            "preview": {"every": 0},
        }
    )


def start(path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "pixeldip.cli", "train", str(path)], stdout=subprocess.DEVNULL)


def reached(run: Path) -> int:
    metrics = read_metrics(run)
    return int(metrics[-1]["step"]) if metrics else 0


def tensors(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(newest_checkpoint(run) / TRAINING_STATE, weights_only=True)
    found = {f"model.{name}": value for name, value in state["model"].items()}
    for index, values in state["optimizer"]["state"].items():
        found |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    ema = DiPPipeline.from_pretrained(str(run)).model.state_dict()
    return found | {f"ema.{name}": value for name, value in ema.items()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    steps = 30 * (arguments.kills + 1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(folder) / name for name in ("alone", "killed")}
        for name, run in runs.items():
            save_recipe(recipe(run, steps), Path(folder) / f"{name}.yaml")
        if start(Path(folder) / "alone.yaml").wait():
            raise SystemExit("the run left alone failed")
        fell = []
        for _ in range(arguments.kills):
            checkpoint = newest_checkpoint(runs["killed"])
            goal = (int(checkpoint.name.split("-")[1]) if checkpoint else 0) + dice.randint(1, 40)
            process = start(Path(folder) / "killed.yaml")
            while reached(runs["killed"]) < goal and process.poll() is None:
                time.sleep(0.002)
            time.sleep(dice.random() * 0.05)  # anywhere within a step, a checkpoint's writing included
            process.kill()
            process.wait()
            newest = newest_checkpoint(runs["killed"])
            fell.append({"killed_at_step": reached(runs["killed"]), "newest_checkpoint": newest and newest.name})
            print(fell[-1], flush=True)
        if start(Path(folder) / "killed.yaml").wait():
            raise SystemExit("the last resume failed")
        ours, theirs = tensors(runs["killed"]), tensors(runs["alone"])
        different = [n for n in theirs if n not in ours or not torch.equal(ours[n], theirs[n])]
    record = {
        "benchmark": "kill_and_resume",
        "pixeldip": __version__,
        "torch": torch.__version__,
        "steps": steps,
        "kills": fell,
        "tensors_compared": len(theirs),
        "tensors_different": len(different),
    }
    print(json.dumps(record))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
