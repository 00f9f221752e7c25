"""The tour: train a small DiP on the bundled pictures, sample it, and show everything on one page."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console

from .errors import UserError
from .images import to_pil
from .pipeline import DiPPipeline
from .processes import autocast, choose_device, choose_precision
from .recipe import Recipe, load_recipe
from .report import demo_page
from .training import train

SAMPLES_PER_CLASS = 10
STEPS = 20
GUIDANCE = 2.0
PATH_IMAGES = 8


@dataclass
class DemoArguments:
    """Train a small DiP on the bundled pictures, sample it, and write one HTML page about it.

    Interrupted with Ctrl-C, it saves; the same command goes on from there.
    """

    out: Path = Path("runs/demo")
    """The run folder; the page is its report.html."""
    steps: int | None = None
    """Optimizer steps; by default the recipe's."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def run_demo(arguments: DemoArguments) -> int:
    """Returns the exit status: 0, or 130 when interrupted during training."""
    began = time.perf_counter()
    console = Console()
    device = choose_device(arguments.device)
    recipe = load_recipe("demo-gpu" if device.type == "cuda" else "demo")
    recipe.out = str(arguments.out)
    recipe.training.seed = arguments.seed
    recipe.training.device = arguments.device
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise UserError(f"--steps {arguments.steps}: must be at least 1")
        recipe.training.steps = arguments.steps
    outcome = train(recipe, console)
    if outcome.interrupted_by is not None:
        return 128 + outcome.interrupted_by
    with console.status("sampling"):
        path = write_report(recipe, device, time.perf_counter() - began)
    minutes = (time.perf_counter() - began) / 60
    console.print(f"done in {minutes:.1f} minutes; open {path}", highlight=False)
    return 0


def write_report(recipe: Recipe, device: torch.device, seconds: float) -> Path:
    """Samples the newest checkpoint of a demo run and writes `report.html` beside it."""
    run = Path(recipe.out)
    diffusers_logging.disable_progress_bar()
    pipeline = DiPPipeline.from_pretrained(str(run)).to(device)
    names = pipeline.config.class_names
    dtype = choose_precision(recipe.training.precision, device)
    settings = {
        "num_inference_steps": STEPS,
        "solver": "heun",
        "guidance_scale": GUIDANCE,
        "guidance_interval": (0.0, 1.0),
    }
    began = time.perf_counter()
    with autocast(device, dtype):
        labels = [name for name in names for _ in range(SAMPLES_PER_CLASS)]
        images = pipeline(labels, seeds=range(len(labels)), **settings).images
        sampling_seconds = time.perf_counter() - began
        every = math.ceil(STEPS / (PATH_IMAGES - 1))
        trajectory = pipeline(names[:1], seeds=[0], trajectory_every=every, **settings).trajectory
    rows = {name: images[i * SAMPLES_PER_CLASS : (i + 1) * SAMPLES_PER_CLASS] for i, name in enumerate(names)}
    denoising = [(t, to_pil(x)[0]) for t, x in trajectory]
    page = demo_page(
        recipe,
        model=pipeline.model,
        samples=rows,
        denoising=denoising,
        settings=settings,
        seconds=seconds,
        sampling_seconds=sampling_seconds,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
