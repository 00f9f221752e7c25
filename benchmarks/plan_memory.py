"""What `pixeldip train --plan` says of memory against what steps take here: a table, and one JSON line.

    python benchmarks/plan_memory.py [--out FILE]

Each case trains two steps in a process of its own, with AdamW and the average as the trainer holds them. Measured is
the peak of what torch's allocator had handed out: on a CUDA device as torch counts it, on a CPU as its profiler saw it
(against the plan's count for the CPU's own kernels), with the growth of the process's resident memory beside it.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from record import put_out

from pixeldip import DiP
from pixeldip.plan.figures import state_bytes
from pixeldip.plan.step import PaperStep
from pixeldip.processes import autocast, choose_device
from pixeldip.recipe import image_size, parse_recipe
from pixeldip.training.ema import EMA
from pixeldip.training.loss import training_loss
from pixeldip.training.preparation import model_config

CASES = [  # preset, pixels, images, precision, gradient checkpointing
    ("dip-s/16", 256, 8, "bf16", False),
    ("dip-s/16", 256, 8, "bf16", True),
    ("dip-s/16", 256, 8, "fp32", False),
    ("dip-s/16", 512, 2, "bf16", False),
    ("dip-b/16", 256, 4, "bf16", False),
    ("dip-b/16", 256, 4, "bf16", True),
]
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def case_recipe(preset: str, pixels: int, images: int, precision: str, checkpointing: bool):
    training = {"batch_size": images, "precision": precision, "gradient_checkpointing": checkpointing}
    return parse_recipe({"model": {"preset": preset}, "data": {"resolution": pixels}, "training": training})


def measure(case: tuple) -> dict[str, int]:
    """Bytes at the peak of two steps."""
    recipe, device = case_recipe(*case), choose_device("auto")
    small = parse_recipe({"data": {"resolution": 32}, "training": {"batch_size": 1, "precision": case[3]}})
    _train(DiP(hidden_size=64, depth=1, num_heads=1, head_width=8), small, device)  # libraries are loaded
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _train(DiP(**model_config(recipe.model, 1000)), recipe, device)
        return {"allocated_bytes": torch.cuda.max_memory_allocated()}
    before = _most_resident()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _train(DiP(**model_config(recipe.model, 1000)), recipe, device)
    resident = _most_resident() - before
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return {"allocated_bytes": max(itertools.accumulate(changes)), "resident_bytes": resident}


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _train(model: DiP, recipe, device: torch.device) -> None:
    model.to(device).train()
    if recipe.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    ema = EMA(model, 0.999)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = recipe.training.batch_size
    for step in range(2):
        x = torch.randn(images, 3, *image_size(recipe.data), device=device)
        y, t = torch.zeros(images, dtype=torch.long, device=device), torch.rand(images, device=device)
        with autocast(device, PRECISIONS[recipe.training.precision]):
            loss = training_loss(model, model.objective, None, x, y, torch.randn_like(x), t)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)


def planned(case: tuple, device: torch.device) -> int:
    recipe = case_recipe(*case)
    precision, fused = PRECISIONS[recipe.training.precision], device.type == "cuda"
    step = PaperStep(recipe, model_config(recipe.model, 1000), precision, fused=fused)
    checkpointing = recipe.training.gradient_checkpointing
    return sum(state_bytes(step, 1).values()) + step.peak_bytes(recipe.training.batch_size, checkpointing, False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measure(CASES[arguments.case])))
        return
    device = choose_device("auto")
    rows = []
    for i, case in enumerate(CASES):
        command = [sys.executable, __file__, "--case", str(i)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        measured, said = json.loads(output.splitlines()[-1]), planned(case, device)
        names = ("model", "pixels", "images", "precision", "gradient_checkpointing")
        rows.append({**dict(zip(names, case)), "planned_bytes": said, **measured})
        shown = ", ".join(f"{name} {value / 1e9:.3f}" for name, value in measured.items())
        print(*case, f"planned {said / 1e9:.3f}, {shown}; planned / allocated {said / measured['allocated_bytes']:.3f}")
    put_out({"benchmark": "plan_memory", "rows": rows}, device, arguments.out)


if __name__ == "__main__":
    main()
