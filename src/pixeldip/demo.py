"""The tour: train a small DiP on the bundled pictures, sample it, and show everything on one page."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .arguments import DemoArguments
from .data import open_source
from .evaluation import ArrayImages
from .evaluation.extractors import load_extractor
from .evaluation.image_sets import SourceImages
from .evaluation.metrics import boundary_ratio, kernel_distance, nearest_neighbours
from .evaluation.stream import measure
from .files import write_json
from .images import to_pil
from .processes import Processes, choose_device, choose_precision
from .provenance import made_by
from .recipe import Recipe, image_size, load_recipe
from .report.demo import demo_page
from .sampling import load_pipeline
from .terminal import PlainConsole, say
from .training import train

SAMPLES_PER_CLASS = 8
STEPS = 20
GUIDANCE = 2.0
PATH_IMAGES = 8
FLOOR_SPLITS = 20


def run_demo(arguments: DemoArguments) -> int:
    """What `pixeldip demo` does. Returns the exit status: 0, or 130 when interrupted during training."""
    began = time.perf_counter()
    console = PlainConsole()
    device = choose_device(arguments.device)
    recipe = load_recipe("demo-gpu" if device.type == "cuda" else "demo")
    recipe.out = str(arguments.out)
    recipe.training.seed = arguments.seed
    recipe.training.device = arguments.device
    if arguments.steps is not None:
        recipe.training.steps = arguments.steps
    outcome = train(recipe, console)
    if outcome.status:
        return outcome.status
    recipe.training.steps = outcome.step  # more than were asked for, if the run had done them before
    with console.status("sampling"):
        path = write_report(recipe, device, time.perf_counter() - began)
    minutes = (time.perf_counter() - began) / 60
    say(console, f"done in {minutes:.1f} minutes; open {path}")
    return 0


def write_report(recipe: Recipe, device: torch.device, seconds: float) -> Path:
    """Samples the newest checkpoint of a demo run and writes `report.html` beside it."""
    run = Path(recipe.out)
    pipeline = load_pipeline(str(run), device, choose_precision(recipe.training.precision, device))
    names = pipeline.config.class_names
    settings = {
        "num_inference_steps": STEPS,
        "solver": "heun",
        "guidance_scale": GUIDANCE,
        "guidance_interval": (0.0, 1.0),
    }
    began = time.perf_counter()
    labels = [name for name in names for _ in range(SAMPLES_PER_CLASS)]
    images = pipeline(labels, seeds=range(len(labels)), **settings).images
    sampling_seconds = time.perf_counter() - began
    every = math.ceil(STEPS / (PATH_IMAGES - 1))
    trajectory = pipeline(names[:1], seeds=[0], trajectory_every=every, **settings).trajectory
    rows = {name: images[i * SAMPLES_PER_CLASS : (i + 1) * SAMPLES_PER_CLASS] for i, name in enumerate(names)}
    denoising = [(t, to_pil(x)[0]) for t, x in trajectory]
    distances = measure_demo(recipe, images, pipeline.model.config.patch_size, device)
    write_json(run / "evaluation.json", {**made_by(), **distances})
    page = demo_page(
        recipe,
        model=pipeline.model,
        samples=rows,
        denoising=denoising,
        distances=distances,
        settings=settings,
        seconds=seconds,
        sampling_seconds=sampling_seconds,
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def measure_demo(
    recipe: Recipe, samples: Sequence[Image.Image], patch_size: int, device: torch.device
) -> dict[str, Any]:
    """How near the samples come to drawings the model has not seen, and to those it has.

    Kernel distances of EfficientNet-Lite0 features, which have no bias in the number of pictures, beside the noise
    floor: the same distance between two random halves of the real drawings.
    """
    extractor = load_extractor("efficientnet", device)
    splits = [
        SourceImages(open_source(dataclasses.replace(recipe.data, split=split)), "emoji", image_size(recipe.data))
        for split in ("train", "test")
    ]
    sets = [ArrayImages(np.stack([np.asarray(image) for image in samples])), *splits]
    measured = [measure(images, [extractor], Processes(0, 1, device)) for images in sets]
    ours, train, held_out = (m.kept["efficientnet", "pool"] for m in measured)
    real = torch.cat([train, held_out])
    halves = []
    for split in range(FLOOR_SPLITS):
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(split))
        halves.append(kernel_distance(*real[order].tensor_split(2)))
    return {
        "samples": len(ours),
        "train": len(train),
        "held_out": len(held_out),
        "kernel_distance": {
            "samples_to_held_out": kernel_distance(ours, held_out),
            "train_to_held_out": kernel_distance(train, held_out),
            "floor": float(np.mean(halves)),
            "floor_deviation": float(np.std(halves, ddof=1)),
        },
        "nearest_training_image": {
            "samples": nearest_neighbours(ours, train)[0].median().item(),
            "held_out": nearest_neighbours(held_out, train)[0].median().item(),
        },
        "boundary_ratio": {
            name: boundary_ratio(m.columns, m.rows, patch_size)
            for name, m in zip(("samples", "train", "held_out"), measured)
        },
    }
