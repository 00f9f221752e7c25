"""A step as `pixeldip train` takes it, beside the bare one of `pixeldip bench training`: a table, and one JSON line.

    python benchmarks/trainer_step.py [--recipe demo] [--model PRESET] [--batch N] [--rounds 7] [--out FILE]

The batch is at hand in memory, as bytes. The trainer's step draws noise, times and dropped classes for each image from
a seed of its own, watches losses and gradients, and looks at them as often as the recipe logs. The same in float32, and
without a head. Contenders take turns; ratios are within rounds.
"""

import argparse
import copy
import dataclasses
import itertools
from pathlib import Path

import torch
from record import put_out
from rich.console import Console

from pixeldip import DiP
from pixeldip.bench.contenders import Contender, compare
from pixeldip.bench.steps import TrainingStep
from pixeldip.data import Batch, EpochOrder
from pixeldip.images import from_uint8
from pixeldip.model import network_config
from pixeldip.processes import Processes, choose_device, choose_precision
from pixeldip.recipe import Recipe, image_size, load_recipe
from pixeldip.terminal import progress
from pixeldip.training.divergence import Watch
from pixeldip.training.learner import Learner
from pixeldip.training.preparation import model_config

CLASSES = 10


def trainer_contender(recipe: Recipe, model: DiP, batch: Batch, processes: Processes) -> Contender:
    learner = Learner(recipe, model.to(processes.device), processes)
    watch = Watch(recipe.training, EpochOrder(len(batch.labels), 0), processes)
    count = itertools.count()

    def step() -> None:
        number = next(count)
        learner.step(number, [batch], watch)
        if number % recipe.training.log_every == 0:
            watch.look()
            watch.means()

    images = len(batch.labels)
    return Contender(step, images, images, learner.precision, model.num_parameters())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--model", help="a preset in place of the recipe's model, at its own size")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    recipe, device = load_recipe(asked.recipe), choose_device("auto")
    if asked.model:
        model = DiP.from_preset(asked.model, num_classes=CLASSES)
        recipe = dataclasses.replace(
            recipe, data=dataclasses.replace(recipe.data, resolution=16 * model.config.patch_size)
        )
    else:
        model = DiP(**model_config(recipe.model, num_classes=CLASSES))
    count = asked.batch or recipe.training.batch_size
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, batch_size=count))
    processes = Processes(0, 1, device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, *image_size(recipe.data)), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, torch.arange(count) % CLASSES, list(range(count)), {})
    exact = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, precision="fp32"))
    headless = DiP(**{**network_config(model.config), "head": "linear", "head_width": None, "head_depth": None})
    bare = TrainingStep(copy.deepcopy(model).to(device), choose_precision(recipe.training.precision, device))
    contenders = {
        "ours": trainer_contender(recipe, copy.deepcopy(model), batch, processes),
        "bare": bare.contender(from_uint8(pixels).to(device), batch.labels.to(device)),
        "fp32": trainer_contender(exact, copy.deepcopy(model), batch, processes),
        "DiT-only": trainer_contender(recipe, headless, batch, processes),
    }
    with progress(Console(stderr=True), "turns") as start:
        timings = compare(contenders, asked.rounds, device, start)
    for name, row in timings.rows.items():
        print(f"{name:<9} {row['milliseconds']:7.1f} ± {row['spread']:.1f} ms {row['images_per_second']:7.1f} images/s")
    ratios = timings.ratios()
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    arguments = {name: value for name, value in vars(asked).items() if name != "out"}
    record = {"benchmark": "trainer_step", **arguments, "batch": count, **timings.record(), "ratios": ratios}
    put_out(record, device, asked.out)


if __name__ == "__main__":
    main()
