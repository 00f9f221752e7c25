"""Speed and memory of the demo's training step: a table, and one JSON line.

    python benchmarks/demo_training.py [--steps 30] [--rounds 3]

The variants take turns, so that a drifting machine slows all of them; figures are medians over
rounds, and the ratios are against the recipe as it is, within each round.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import statistics
import time
from contextlib import nullcontext

import torch

from pixeldip import DiP, __version__
from pixeldip.data import EpochOrder
from pixeldip.processes import Processes
from pixeldip.recipe import image_size, load_recipe
from pixeldip.training.divergence import Watch, spreading
from pixeldip.training.loss import training_loss
from pixeldip.training.preparation import model_config


def step_function(recipe, precision: torch.dtype, watched: bool = True, **changes):
    section = dataclasses.replace(recipe.model, **changes)
    model = DiP(**model_config(section, num_classes=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.optimizer.lr, fused=True)
    height, width = image_size(recipe.data)
    x = torch.randn(recipe.training.batch_size, 3, height, width)
    y = torch.arange(len(x)) % 10
    watch = Watch(recipe.training, EpochOrder(len(x), 0), Processes(0, 1, torch.device("cpu")))
    count = itertools.count()

    def step() -> None:
        with torch.autocast("cpu", precision) if precision != torch.float32 else nullcontext():
            losses = training_loss(model, model.objective, None, x, y, torch.randn_like(x), torch.rand(len(x)))
        (spreading(losses["loss"]) if watched else losses["loss"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if watched:
            number = next(count)
            watch.part(losses)
            watch.step(number, optimizer, norm)
            if number % recipe.training.log_every == 0:
                watch.look()
                watch.means()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    recipe = load_recipe("demo")
    steps = {
        "bf16": step_function(recipe, torch.bfloat16),
        "fp32": step_function(recipe, torch.float32),
        "bf16, unwatched": step_function(recipe, torch.bfloat16, watched=False),
        "bf16, DiT-only": step_function(recipe, torch.bfloat16, head="linear", head_width=None),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            times[name].append((time.perf_counter() - began) / arguments.steps)
    batch = recipe.training.batch_size
    rows = {
        name: {
            "ms_per_step": round(1e3 * statistics.median(values), 1),
            "images_per_second": round(batch / statistics.median(values), 1),
            "spread": [round(batch / max(values), 1), round(batch / min(values), 1)],
            "time_over_bf16": round(statistics.median(v / b for v, b in zip(values, times["bf16"])), 2),
        }
        for name, values in times.items()
    }
    print(f"{'variant':<16} {'ms/step':>8} {'steps/s':>8} {'images/s':>9} {'x bf16':>7}")
    for name, row in rows.items():
        ms = row["ms_per_step"]
        speed = f"{1e3 / ms:>8.2f} {row['images_per_second']:>9}"
        print(f"{name:<16} {ms:>8} {speed} {row['time_over_bf16']:>7}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"peak memory of this process: {peak:.0f} MiB")
    record = {
        "benchmark": "demo_training",
        "pixeldip": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch_size": batch,
        "peak_mib": round(peak),
        "variants": rows,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
