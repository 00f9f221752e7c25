"""Self-contained HTML pages: pictures and plots are inside the file."""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .. import __version__
from ..data import centre_crop, open_source
from ..files import write_text
from ..images import display_scale, grid
from ..model import DiP
from ..recipe import Recipe, image_size
from ..run_folder import ENVIRONMENT, read_metrics, training_rate
from ..terminal import clock

ACCENT = "#2456d6"


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


_SETS = (("held_out", "held-out drawings"), ("samples", "samples"), ("train", "training drawings"))


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


def light_frame(axes: Axes, **grid: Any) -> None:
    """What every plot here has: a faint grid (arguments of `Axes.grid`), and no box around it."""
    axes.grid(alpha=0.25, **grid)
    axes.spines[["top", "right"]].set_visible(False)


def loss_curve(metrics: Sequence[Mapping[str, float]]) -> str:
    """The training loss against the step, as inline SVG."""
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color=ACCENT, linewidth=1.4)
    axes.set(xlabel="step", ylabel="velocity loss (mean of squares)", yscale="log")
    light_frame(axes, which="both")
    return to_svg(figure)


def render(template: str, **content: Any) -> str:
    """A template of this folder, filled in; HTML ones escape what is put in."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("pixeldip", "report"),
        autoescape=jinja2.select_autoescape(("html",)),
        keep_trailing_newline=True,
    )
    return templates.get_template(template).render(**content)


def machine(environment: Mapping[str, Any]) -> str:
    """Where something was measured, from its `provenance.environment`, for people."""
    return (
        f"{environment['device']}, {environment['threads']} threads; torch {environment['torch']}, "
        f"pixeldip {environment['pixeldip']}"
    )


def write_pages(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Writes report.md and report.html from the templates of a name; returns the HTML page."""
    for kind in ("md", "html"):
        write_text(folder / f"report.{kind}", render(f"{name}.{kind}", **content))
    return folder / "report.html"


def to_svg(figure: Figure) -> str:
    """A figure as an <svg> element; the same figure gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pixeldip", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def data_uri(image: Image.Image) -> str:
    """A picture as a data: URI (PNG)."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
