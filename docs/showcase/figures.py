"""The pictures of this page. Samples are of seeds 0, 1, 2 …, none chosen.

python docs/showcase/figures.py grid MODEL … OUT.png --classes A B C    for each class a row of each model
python docs/showcase/figures.py nearest MODEL TRAINING_IMAGES OUT.png   samples above the nearest training images
python docs/showcase/figures.py time RUN … OUT.png --steps 500 1000     previews, a row per step
python docs/showcase/figures.py rows PICTURE … OUT.png                 the pictures in a sweep's settings/, stacked
python docs/showcase/figures.py loss RUN … OUT.svg                      losses, each the mean of a hundred steps
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pixeldip.evaluation.extractors import load_extractor
from pixeldip.evaluation.image_sets import ArrayImages, open_images
from pixeldip.evaluation.metrics import nearest_neighbours
from pixeldip.evaluation.stream import measure
from pixeldip.images import grid, save_png
from pixeldip.processes import Processes, choose_device
from pixeldip.provenance import made_by
from pixeldip.recipe import image_size, load_recipe
from pixeldip.report import light_frame, to_svg
from pixeldip.run_folder import DATA, RECIPE, read_metrics
from pixeldip.sampling import SampledImages, load_pipeline
from pixeldip.training.preview import preview_classes, read_previews

COLUMNS = 14
PROCESSES = Processes(0, 1, choose_device("cpu"))


def rows_of(images: list[np.ndarray]) -> list[list[np.ndarray]]:
    return [images[i : i + COLUMNS] for i in range(0, len(images), COLUMNS)]


def sampled(model: str, named: list[str]) -> list[np.ndarray]:
    """Samples as the model is saved to be sampled: a row for each class named; else two rows of all classes in turn."""
    pipeline = load_pipeline(model, PROCESSES.device)
    classes = [name for name in named for _ in range(COLUMNS)]
    count = len(classes) or 2 * COLUMNS
    return list(SampledImages(pipeline, pipeline.default_settings, range(count), classes).read(0, count))


def with_nearest(samples: list[np.ndarray], training_images: str) -> list[list[np.ndarray]]:
    """Rows of samples, and below each the training images nearest to them in EfficientNet's features."""
    real = open_images(training_images, size=samples[0].shape[:2])
    extractor = load_extractor("efficientnet", PROCESSES.device)
    sets = ArrayImages(np.stack(samples)), real
    features = [measure(images, [extractor], PROCESSES).kept["efficientnet", "pool"] for images in sets]
    _, places = nearest_neighbours(*features)
    found = [real.read(place, place + 1)[0] for place in places.tolist()]
    return [row for pair in zip(rows_of(samples), rows_of(found)) for row in pair]


def over_time(runs: list[str], steps: list[int]) -> list[list[np.ndarray]]:
    """The first picture of classes spread evenly, from the previews of one recipe's runs: each step from the last run
    that has it."""
    found: dict[int, list[np.ndarray]] = {}
    for run in map(Path, runs):
        recipe = load_recipe(str(run / RECIPE))
        classes = len(json.loads((run / DATA).read_text(encoding="utf-8"))["classes"])
        found |= read_previews(run, image_size(recipe.data), recipe.preview.images)
    _, labels = preview_classes(recipe.preview.images, classes)
    shown = [labels.index(round(i * (classes - 1) / (COLUMNS - 1))) for i in range(COLUMNS)]
    return [[found[step][i] for i in shown] for step in steps]


def losses(runs: list[str]) -> str:
    """As SVG. A run's folder names its line."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes, last = figure.subplots(), 0.0
    for run in map(Path, runs):
        metrics = [(m["step"], m["loss"]) for m in read_metrics(run)]
        (logged, _), *_ = metrics
        means = np.array([np.mean(metrics[i : i + 100 // logged], 0) for i in range(0, len(metrics), 100 // logged)])
        axes.plot(*means.T, linewidth=1.4, label=run.name)
        last = max(last, means[-1, 1])
    axes.set(xlabel="step", ylabel="velocity loss (mean of squares)", yscale="log", ylim=(None, 4 * last))
    axes.legend(frameon=False)
    light_frame(axes, which="both")
    return to_svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grid", "nearest", "time", "rows", "loss"))
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--classes", nargs="+", default=[])
    arguments = parser.parse_args()
    inputs, classes = arguments.inputs, arguments.classes
    if arguments.what == "loss":
        arguments.out.write_text(losses(inputs), encoding="utf-8")
        return
    if arguments.what == "rows":
        stacked = np.vstack([np.asarray(Image.open(file)) for file in inputs])
        save_png(Image.fromarray(stacked), arguments.out, made_by())
        return
    if arguments.what == "grid":
        of_models = [rows_of(sampled(model, classes)) for model in inputs]
        shown = [row for rows in zip(*of_models) for row in rows]
    elif arguments.what == "nearest":
        model, training_images = inputs
        shown = with_nearest(sampled(model, classes), training_images)
    else:
        shown = over_time(inputs, arguments.steps)
    pictures = [Image.fromarray(pixels) for row in shown for pixels in row]
    save_png(grid(pictures, COLUMNS), arguments.out, made_by())


if __name__ == "__main__":
    main()
