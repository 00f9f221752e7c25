"""What is measured of a trained contender: its loss on held-out images, its samples, its cost."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..bench.timing import Step, Times, count_flops, take_turns
from ..data import Source
from ..evaluation import Evaluator
from ..evaluation.image_sets import SourceImages, read_rows
from ..flow import OBJECTIVES, Stream, fold_seed, interpolate, seeded_normal
from ..images import from_uint8
from ..model import DiP
from ..pipeline import DiPPipeline
from ..processes import Processes, autocast, choose_precision
from ..recipe import Recipe, image_size
from ..sampling import SampledImages
from ..training.preparation import model_config

TIMES = tuple((i + 0.5) / 10 for i in range(10))
"""Where the validation loss is taken: 0.05, 0.15 … 0.95."""
VALIDATION_IMAGES = 512
BATCH = 64
LATENCY_ROUNDS = 7


@torch.no_grad()
def validation_losses(
    model: DiP, images: SourceImages, device: torch.device, precision: torch.dtype
) -> dict[str, float]:
    """The velocity loss (Eq. 5) at each of `TIMES`, on 512 images spread evenly over all, which may be in the order of
    their classes, with noise that is always the same.

    It is the velocity's for every objective, so that they can be compared.
    """
    sums = {t: 0.0 for t in TIMES}
    count = min(len(images), VALIDATION_IMAGES)
    rows = [i * len(images) // count for i in range(count)]
    null_class = model.config.num_classes
    for start in range(0, count, BATCH):
        part = rows[start : start + BATCH]
        pixels = torch.from_numpy(read_rows(images, part)).permute(0, 3, 1, 2)
        x = from_uint8(pixels.to(device))
        labels = [null_class] * len(x) if images.labels is None else images.labels[part].tolist()
        y = torch.tensor(labels, device=device)
        for k, time_ in enumerate(TIMES):
            seeds = [fold_seed(Stream.VALIDATION, i, k) for i in part]
            noise = seeded_normal(seeds, x.shape[1:], device)
            t = x.new_full((len(x),), time_)
            with autocast(device, precision):
                v = model(interpolate(x, noise, t), t, y)
            sums[time_] += OBJECTIVES["velocity"].loss(v, x, noise, t).sum().item()
    return {f"{t:g}": total / count for t, total in sums.items()}


def held_out_images(held_out: Source, recipe: Recipe) -> SourceImages:
    return SourceImages(held_out, "held-out images", image_size(recipe.data), allow_enlarging=True, skip_broken=True)


def evaluator_of(
    recipe: Recipe, held_out: Source, patch_size: int | None, processes: Processes, console: Console
) -> Evaluator:
    """What measures a run's samples, against the reference, or the held-out images where the recipe names none.

    Raises:
        UserError: if something for it is missing; see `Evaluator`.
    """
    section = dataclasses.replace(recipe.evaluation, patch_size=patch_size)
    own_images = None if section.reference else held_out_images(held_out, recipe)
    evaluator = Evaluator(section, *image_size(recipe.data), processes, console, own_images)
    evaluator.tell(own_images.unreadable(processes) if own_images else [])
    return evaluator


def measure_quality(
    pipeline: DiPPipeline, recipe: Recipe, held_out: Source, processes: Processes, console: Console
) -> dict[str, Any]:
    """Validation losses and the evaluation suite's numbers, with their floors. All processes take part."""
    precision = choose_precision(recipe.training.precision, processes.device)
    section = recipe.evaluation
    real = held_out_images(held_out, recipe)
    losses = validation_losses(pipeline.model, real, processes.device, precision)
    samples = SampledImages(
        pipeline, section, range(section.images), order_seed=0, precision=precision, name=recipe.out
    )
    evaluation = evaluator_of(recipe, held_out, pipeline.model.config.patch_size, processes, console).evaluate(samples)
    return {
        "validation_loss": statistics.fmean(losses.values()),
        "validation_losses": losses,
        "metrics": evaluation.metrics,
        "floors": evaluation.floors,
        "labels": evaluation.record["labels"],
        "warnings": evaluation.warnings,
    }


def measure_costs(recipes: Mapping[str, Recipe], num_classes: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Parameters, FLOPs and latency of contenders by name, in turn, so that all meet the same machine.

    Returns:
        "parameters"; "flops" of one image's forward pass; "latency", seconds of one guided step of one image (both
        branches), the median of several rounds, and "latency_spread", half of its interquartile range.
    """
    steps: dict[str, Step] = {}
    costs: dict[str, dict[str, float]] = {}
    for name, recipe in recipes.items():
        model = DiP(**model_config(recipe.model, num_classes)).eval().to(device)
        precision = choose_precision(recipe.training.precision, device)
        steps[name] = _forward(model, recipe, labels=2, precision=precision)
        once = _forward(model, recipe, labels=1, precision=precision)
        once()  # composes kernels that are kept from then on
        costs[name] = {"parameters": model.num_parameters(), "flops": count_flops(once)}
    for name, seconds in take_turns(steps, LATENCY_ROUNDS, device).items():
        times = Times.of(seconds)
        costs[name] |= {"latency": times.median, "latency_spread": times.spread}
    return costs


def _forward(model: DiP, recipe: Recipe, labels: int, precision: torch.dtype) -> Step:
    device = model.device
    x = torch.randn(1, model.config.in_channels, *image_size(recipe.data), device=device)
    t, y = torch.full((1,), 0.5, device=device), torch.zeros(labels, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def step() -> Tensor:
        with autocast(device, precision):
            return model(x, t, y)

    return step
