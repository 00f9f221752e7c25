"""The page of the demo: what was trained, its samples beside real pictures, distances, the loss."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from .. import __version__
from ..data import centre_crop, open_source
from ..images import display_scale, grid
from ..model import DiP
from ..recipe import Recipe, image_size
from ..run_folder import ENVIRONMENT, read_metrics, training_rate
from ..terminal import clock
from . import ACCENT, data_uri, light_frame, render, to_svg

_SETS = (("held_out", "held-out drawings"), ("samples", "samples"), ("train", "training drawings"))


def demo_page(
    recipe: Recipe,
    model: DiP,
    samples: Mapping[str, Sequence[Image.Image]],
    denoising: Sequence[tuple[float, Image.Image]],
    distances: Mapping[str, Any],
    settings: Mapping[str, Any],
    seconds: float,
    sampling_seconds: float,
) -> str:
    """The page `pixeldip demo` writes.

    Args:
        samples: pictures by class name.
        denoising: (t, x_t) of one sample from noise to picture.
        distances: what `demo.measure_demo` returns.
        settings: the pipeline's sampling arguments.
        seconds: whole wall time of the last start, sampling left out.
    """
    run = Path(recipe.out)
    metrics = read_metrics(run)
    environment = json.loads((run / ENVIRONMENT).read_text(encoding="utf-8"))
    source = open_source(recipe.data)
    height, width = image_size(recipe.data)
    config = model.config
    count = sum(map(len, samples.values()))
    facts = {
        "Data": f"{len(source)} pictures in {len(source.class_names)} classes, {height}×{width} px",
        "Model": f"DiP, {model.num_parameters() / 1e6:.2f} M parameters: {config.depth} blocks "
        f"{config.hidden_size} wide on {config.patch_size}×{config.patch_size} patches, {config.head} head, "
        f"predicts the {config.prediction}",
        "Training": f"{recipe.training.steps} steps of {recipe.training.batch_size} images "
        f"({recipe.training.steps * recipe.training.batch_size:,} images seen), seed {recipe.training.seed}",
        "Time": f"{clock(seconds)} in this start; {training_rate(run):.0f} images/s while training (median)",
        "Sampling": f"{count} images in {sampling_seconds:.1f} s: {settings['solver']}, "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']:g}, EMA weights",
        "Made by": f"{environment['command']} · pixeldip {__version__}, torch {environment['torch']}, "
        f"{environment['device']}, {environment['threads']} threads",
    }
    scale = display_scale(width, 72)
    real = {split: _pictures_by_class(recipe, split) for split in ("train", "test")}
    rows = [
        {
            "name": name,
            "samples": data_uri(grid(pictures, len(pictures), scale=scale)),
            **{
                split: data_uri(grid(pictures[name], len(pictures[name]), scale=scale))
                for split, pictures in real.items()
            },
        }
        for name, pictures in samples.items()
    ]
    path = [
        {"t": f"{t:.2f}", "image": data_uri(grid([image], 1, scale=display_scale(width, 104)))}
        for t, image in denoising
    ]
    return render(
        "demo.html",
        facts=facts,
        rows=rows,
        path=path,
        path_class=next(iter(samples)),
        distances=_distance_rows(distances),
        copying=_copying(distances),
        seams=_seams(distances),
        loss=loss_curve(metrics),
        run=recipe.out,
        classes=len(rows),
    )


def _pictures_by_class(recipe: Recipe, split: str) -> dict[str, list[Image.Image]]:
    source = open_source(dataclasses.replace(recipe.data, split=split))
    pictures: dict[str, list[Image.Image]] = {name: [] for name in source.class_names}
    for i in range(len(source)):
        picture, label, _ = source.picture(i)
        cropped = centre_crop(picture, *image_size(recipe.data))
        pictures[source.class_names[label]].append(Image.fromarray(cropped))
    return pictures


def _distance_rows(distances: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value, note) of the table of distances."""
    d = distances["kernel_distance"]
    held_out, samples, train = (f"{distances[key]} {name}" for key, name in _SETS)
    both = distances["held_out"] + distances["train"]
    return [
        (f"{samples} to {held_out}", _thousands(d["samples_to_held_out"]), "the model"),
        (f"{train} to {held_out}", _thousands(d["train_to_held_out"]), "what real drawings reach"),
        (
            f"two random halves of all {both} drawings",
            f"{_thousands(d['floor'])} ± {_thousands(d['floor_deviation'])}",
            "the noise floor",
        ),
    ]


def _thousands(value: float) -> str:
    return f"{1e3 * value:.0f}".replace("-", "−")


def _copying(distances: Mapping[str, Any]) -> str:
    near = distances["nearest_training_image"]
    return (
        f"Does it copy? Half of the samples are nearer than {near['samples']:.1f} to some training drawing, half of "
        f"the held-out drawings nearer than {near['held_out']:.1f} (in the same features). The more samples undercut "
        "real drawings, the more they redraw what was seen."
    )


def _seams(distances: Mapping[str, Any]) -> str:
    ratio = distances["boundary_ratio"]
    return (
        f"Seams: samples change {ratio['samples']:.2f} times as much across patch borders as inside patches, "
        f"training drawings {ratio['train']:.2f} times, held-out ones {ratio['held_out']:.2f} times."
    )


def loss_curve(metrics: Sequence[Mapping[str, float]]) -> str:
    """The training loss against the step, as inline SVG."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color=ACCENT, linewidth=1.4)
    axes.set(xlabel="step", ylabel="velocity loss (mean of squares)", yscale="log")
    light_frame(axes, which="both")
    return to_svg(figure)
