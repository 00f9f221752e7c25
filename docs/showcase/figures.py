"""The pictures of this page.

python docs/showcase/figures.py time RUN OUT.png        the previews of a run, a row per step
python docs/showcase/figures.py nearest MODEL TRAINING_IMAGES OUT.png [--label-column NAME]
                                                        samples above the training images nearest to them
python docs/showcase/figures.py beside MODEL MODEL OUT.png
                                                        the same seeds and classes of two models, a row each
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixeldip.data import open_source
from pixeldip.evaluation import ArrayImages
from pixeldip.evaluation.extractors import load_extractor
from pixeldip.evaluation.image_sets import SourceImages
from pixeldip.evaluation.metrics import nearest_neighbours
from pixeldip.evaluation.stream import measure
from pixeldip.images import grid, save_png
from pixeldip.processes import Processes, choose_device
from pixeldip.provenance import made_by
from pixeldip.recipe import DataSection, SamplingSettings, image_size, load_recipe
from pixeldip.sampling import SampledImages, load_pipeline
from pixeldip.studies.overfit import previews

SETTINGS = SamplingSettings(steps=25, solver="ab2", guidance=2.0, guidance_interval=(0.1, 1.0))
PROCESSES = Processes(0, 1, choose_device("auto"))
SHOWN = 16
"""Pictures in a row."""


def save(rows: list[list[np.ndarray]], out: Path) -> None:
    pictures = [Image.fromarray(pixels) for row in rows for pixels in row]
    save_png(grid(pictures, len(rows[0])), out, made_by())


def spread(count: int) -> list[int]:
    """`SHOWN` of so many classes, evenly."""
    return [round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)]


def sampled(model: str, classes: list[int]) -> np.ndarray:
    """A sample of each class, seeds 0, 1, 2 …"""
    pipeline = load_pipeline(model, PROCESSES.device)
    return SampledImages(pipeline, SETTINGS, range(len(classes)), classes).read(0, len(classes))


def over_time(run: Path, out: Path) -> None:
    recipe = load_recipe(str(run / "recipe.yaml"))
    found = previews(run, *image_size(recipe.data), recipe.preview.images)
    steps = sorted(found)
    chosen = [s for s in steps if s in (steps[0], steps[-1]) or s in (2 * steps[0], 4 * steps[0], 8 * steps[0])]
    print("steps", chosen)
    save([[found[step][i] for i in spread(recipe.preview.images)] for step in chosen], out)


def nearest(model: str, training_images: str, label_column: str | None, out: Path) -> None:
    source = open_source(DataSection(source=training_images, label_column=label_column))
    classes = spread(len(source.class_names))
    samples = sampled(model, classes)
    real = SourceImages(source, training_images, samples.shape[1:3], allow_enlarging=True, skip_broken=True)
    extractor = load_extractor("efficientnet", PROCESSES.device)
    features = [
        measure(images, [extractor], PROCESSES).kept["efficientnet", "pool"] for images in (ArrayImages(samples), real)
    ]
    distances, rows = nearest_neighbours(*features)
    print("distances", [round(d, 1) for d in distances.tolist()])
    save([list(samples), [real.read(row, row + 1)[0] for row in rows.tolist()]], out)


def beside(models: list[str], out: Path) -> None:
    count = load_pipeline(models[0], torch.device("cpu")).model.config.num_classes
    save([list(sampled(model, spread(count))) for model in models], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "nearest", "beside"))
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("out", type=Path)
    parser.add_argument("--label-column")
    arguments = parser.parse_args()
    if arguments.what == "time":
        over_time(Path(arguments.inputs[0]), arguments.out)
    elif arguments.what == "nearest":
        nearest(*arguments.inputs, arguments.label_column, arguments.out)
    else:
        beside(arguments.inputs, arguments.out)


if __name__ == "__main__":
    main()
