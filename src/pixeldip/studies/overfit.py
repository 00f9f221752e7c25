"""One photograph, overfitted (Fig. 3): what the DiT-only network cannot paint, and how fast DiP does."""

import dataclasses
import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from ..arguments import StudyArguments
from ..data import BrokenImage, centre_crop, decode
from ..errors import UserError
from ..files import file_sha256
from ..images import display_scale, enlarged, grid, psnr
from ..processes import Processes
from ..provenance import environment
from ..recipe import Recipe, image_size, load_recipe, recipe_values
from ..report import data_uri, light_frame, machine, to_svg, write_pages
from ..run_folder import read_metrics, training_rate
from ..terminal import clock, say
from ..training import train
from ..training.preparation import check_recipe
from ..training.preview import read_previews
from .comparisons import dit, unet
from .folder import RESULT, alone_in, claim, read_json, read_picture, write_result
from .study import Contender, Scale, Study, changed, contender_recipe

PHOTO = "red-panda.jpg"
PHOTOGRAPH = "photo.png"  # what is trained on
RECONSTRUCTION = "reconstruction.png"  # of each run
LARGEST_PSNR = 100.0
"""In dB; what an equal image counts as, since JSON has no infinity."""
ZOOM = 4
"""The zoom shows the middle of the image, 1 / ZOOM of its sides."""
STAGES = (1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1)
"""Shares of the training after which the report shows samples."""
STAGE_WIDTH = 160


def contenders(scale: Scale) -> tuple[Contender, ...]:
    return dataclasses.replace(dit(scale), paper={}), dataclasses.replace(unet(scale, "dip", "DiP"), paper={})


OVERFIT = Study(
    "overfit",
    "Overfitting one photograph",
    "Can the network paint every detail of a single image?",
    "Fig. 3",
    "DiT-only gets layout and colours but stays blurry; with the head, details come, and come sooner.",
    contenders,
)


def run_overfit(arguments: StudyArguments, console: Console) -> int:
    """Trains both networks on the photograph, writes the report; returns the exit status.

    Raises:
        UserError: if the photograph cannot be read, the resolution is no multiple of the patch size, or the folder
            holds a study of other settings.
    """
    out, scale, device = arguments.out, arguments.scale, arguments.device
    photo = _photo(arguments.image)
    base = load_recipe(f"overfit-{scale}")
    base = changed(base, "training", {"device": device, **({"steps": arguments.steps} if arguments.steps else {})})
    source = out / "photo"
    size = {"resolution": arguments.resolution} if arguments.resolution else {}
    base = changed(base, "data", {"source": str(source), **size})
    check_recipe(base, world_size=1)
    settings = {"study": OVERFIT.name, "scale": scale, "photo": photo.name, "photo_sha256": file_sha256(photo)}

    def prepare(_: Processes) -> None:
        claim(out, {**settings, "recipe": recipe_values(base)})
        source.mkdir(exist_ok=True)
        decode(photo.read_bytes()).save(source / PHOTOGRAPH)  # under no name that would tell a split or no image

    alone_in(device, console, prepare)
    for contender in OVERFIT.contenders(scale):
        folder = out / "runs" / contender.name
        if (folder / RESULT).is_file() and (folder / RECONSTRUCTION).is_file():
            continue
        console.rule(contender.label, align="left")
        recipe = contender_recipe(base, contender, 0, str(folder))
        outcome = train(recipe, console)
        if outcome.status:
            return outcome.status
        alone_in(device, console, functools.partial(_measure, folder, recipe, photo, contender))
    page = alone_in(device, console, lambda _: _write_report(out, scale, photo))
    say(console, f"done; open {page}")
    return 0


def _photo(image: Path | None) -> Path:
    path = image or Path(str(resources.files(__package__) / "bundled" / PHOTO))
    try:
        decode(path.read_bytes())
    except (OSError, BrokenImage) as error:
        raise UserError(f"--image {path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _measure(folder: Path, recipe: Recipe, photo: Path, contender: Contender, processes: Processes) -> None:
    size = image_size(recipe.data)
    target = centre_crop(decode(photo.read_bytes()), *size)
    images = _previews(folder, size, recipe.preview.images)
    Image.fromarray(images[max(images)][0]).save(folder / RECONSTRUCTION)
    write_result(
        folder / RESULT,
        {
            "contender": contender.name,
            "psnr": {step: _mean_psnr(taken, target) for step, taken in images.items()},
            "loss": {entry["step"]: entry["loss"] for entry in read_metrics(folder)},
            "images_per_second": training_rate(folder),
            "recipe": recipe_values(recipe),
            "environment": environment(processes),
        },
    )


_LOST_PREVIEWS = "previews are missing; delete {}, and the same command trains again"


def _previews(folder: Path, size: tuple[int, int], images: int) -> dict[int, list[np.ndarray]]:
    """As `read_previews`. Raises UserError if there are none any more."""
    found = read_previews(folder, size, images)
    if not found:
        raise UserError(f"{folder}: {_LOST_PREVIEWS.format('the folder')}")
    return found


def _mean_psnr(images: Sequence[np.ndarray], target: np.ndarray) -> float:
    return float(np.mean([min(psnr(image, target), LARGEST_PSNR) for image in images]))


def _write_report(out: Path, scale: Scale, photo: Path) -> Path:
    named = OVERFIT.contenders(scale)
    results = {c.label: read_json(out / "runs" / c.name / RESULT) for c in named}
    pictures = {c.label: read_picture(out / "runs" / c.name / RECONSTRUCTION) for c in named}
    first = next(iter(results.values()))
    recipe = first["recipe"]
    side = pictures[named[0].label].size
    pictures["The photograph"] = Image.fromarray(centre_crop(decode(photo.read_bytes()), side[1], side[0]))
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    shown = []
    for label, picture in pictures.items():
        enlarged, zoom = _enlarged(picture), _enlarged(_zoom(picture))
        name = label.lower().replace(" ", "-")
        enlarged.save(figures / f"{name}.png", optimize=True)
        zoom.save(figures / f"{name}-zoom.png", optimize=True)
        shown.append((label, name, data_uri(enlarged), data_uri(zoom)))
    steps, over_time = _over_time([out / "runs" / contender.name for contender in named], side, recipe)
    over_time.save(figures / "over-time.png", optimize=True)
    curve = to_svg(_curve(results))
    (figures / "psnr.svg").write_text(curve, encoding="utf-8")
    training = recipe["training"]
    content: dict[str, Any] = {
        "study": OVERFIT,
        "scale": scale,
        "shown": shown,
        "stages": f"After {', '.join(map(str, steps))} steps: {', below it '.join(results)}; seed 0.",
        "over_time": data_uri(over_time),
        "curve": curve,
        "half_way": _half_way(first, training),
        "table": [_row(label, result, training) for label, result in results.items()],
        "facts": {
            "Photograph": f"{photo.name}, cropped and scaled to {side[0]}×{side[1]}",
            "Training": f"{training['steps']} steps of {training['batch_size']} times the photograph, each with noise "
            "and time of its own, the same for both; one seed",
            "Reconstruction": f"samples from pure noise, {recipe['preview']['solver']}, {recipe['preview']['steps']} "
            f"steps, averaged weights; PSNR is the mean over {recipe['preview']['images']} seeds",
            "Machine": machine(first["environment"]),
        },
        "commands": list(dict.fromkeys(result["command"] for result in results.values())),
    }
    return write_pages(out, "overfit", content)


def _half_way(result: dict[str, Any], training: dict[str, Any]) -> int:
    """The step nearest to half of all that was measured."""
    return min(map(int, result["psnr"]), key=lambda step: abs(step - training["steps"] / 2))


def _row(label: str, result: dict[str, Any], training: dict[str, Any]) -> list[str]:
    curve = {int(step): value for step, value in result["psnr"].items()}
    half = curve[_half_way(result, training)]
    loss = np.mean([loss for step, loss in result["loss"].items() if int(step) > 0.9 * training["steps"]])
    seconds = training["steps"] * training["batch_size"] / result["images_per_second"]
    return [label, f"{half:.1f} dB", f"{curve[max(curve)]:.1f} dB", f"{loss:.3g}", clock(seconds)]


def _over_time(folders: Sequence[Path], size: tuple[int, int], recipe: dict[str, Any]) -> tuple[list[int], Image.Image]:
    """The steps nearest to `STAGES`, and a row for each run with its samples of seed 0, (width, height) pixels."""
    width, height = size
    runs = [_previews(folder, (height, width), recipe["preview"]["images"]) for folder in folders]
    common, asked = sorted(set.intersection(*map(set, runs))), recipe["training"]["steps"]
    if not common:
        raise UserError(f"{' and '.join(map(str, folders))}: {_LOST_PREVIEWS.format('both folders')}")
    steps = list(dict.fromkeys(min(common, key=lambda step: abs(step - share * asked)) for share in STAGES))
    pictures = [Image.fromarray(run[step][0]) for run in runs for step in steps]
    if width > STAGE_WIDTH:
        small = STAGE_WIDTH, round(height * STAGE_WIDTH / width)
        pictures = [picture.resize(small, Image.Resampling.LANCZOS) for picture in pictures]
    return steps, grid(pictures, len(steps), gap=4, scale=display_scale(pictures[0].width, STAGE_WIDTH))


def _zoom(picture: Image.Image) -> Image.Image:
    width, height = (side // ZOOM for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _enlarged(picture: Image.Image, target: int = 360) -> Image.Image:
    return enlarged(picture, display_scale(picture.width, target))


def _curve(results: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, result in results.items():
        steps: Sequence[int] = sorted(map(int, result["psnr"]))
        axes.plot(steps, [result["psnr"][str(step)] for step in steps], "o-", markersize=3, linewidth=1.6, label=label)
    axes.set(xlabel="step", ylabel="PSNR of samples, dB", ylim=(0, None))
    light_frame(axes)
    axes.legend(frameon=False)
    return figure
