"""What several scripts here share: a model's samples, their distance to the solution and to real images, a record.

Of the model, seeds and guidance that the command line asks for, guided at every step.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import put_out

from pixeldip.evaluation import Evaluator
from pixeldip.evaluation.image_sets import open_images
from pixeldip.processes import Processes
from pixeldip.sampling import SampledImages, deal_classes, load_pipeline, parse_seeds
from pixeldip.settings import EvaluationOptions, SamplingSettings
from pixeldip.studies.sweep import classes_like

METRICS = ("kid_efficientnet", "fd_mid_efficientnet", "boundary")


class Samples:
    """Args: measures: whether the command may name real images, to measure the distance of samples to."""

    def __init__(self, measures: bool = False) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("model")
        parser.add_argument("--seeds", default="0-31")
        parser.add_argument("--guidance", type=float, default=2.0)
        if measures:
            parser.add_argument("--reference", help="held-out images, to measure samples against, as sweep does")
            parser.add_argument("--images", type=int, default=426, help="samples for that distance")
        parser.add_argument("--out", type=Path)
        self.asked = parser.parse_args()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = load_pipeline(self.asked.model, self.device)
        self.seeds = parse_seeds(self.asked.seeds)
        self.classes = deal_classes(range(self.pipeline.model.config.num_classes), len(self.seeds), None)
        self.evaluator: Evaluator | None = None
        if measures and self.asked.reference:
            size = self.pipeline.config.height, self.pipeline.config.width
            options = EvaluationOptions(metrics=METRICS, patch_size=self.pipeline.model.config.patch_size)
            self.real = open_images(self.asked.reference, "train", size)
            self.evaluator = Evaluator(options, *size, Processes(0, 1, self.device), own_images=self.real)

    def of(self, steps: int, solver: str | None, most: int | None = None, time_shift: float = 1.0) -> np.ndarray:
        """Those of the first so many seeds, in grey levels of 255, about 0; without a solver the pipeline's scheduler
        is followed."""
        x = self.pipeline(
            self.classes[:most],
            seeds=self.seeds[:most],
            num_inference_steps=steps,
            solver=solver,
            guidance_scale=self.asked.guidance,
            guidance_interval=(0.0, 1.0),
            time_shift=time_shift,
            output_type="latent",
        ).images
        return x.clamp(-1, 1).cpu().numpy() * 127.5

    def distances(self, steps: int, solver: str | None) -> dict[str, float]:
        """Of --images samples to the reference, with its classes, and the seconds that a sample takes."""
        settings = SamplingSettings(steps, solver, self.asked.guidance, (0.0, 1.0))
        classes = classes_like(self.real, self.pipeline)
        images = SampledImages(self.pipeline, settings, range(self.asked.images), classes)
        record = self.evaluator.evaluate(images).record
        return {**record["metrics"], "seconds": record["seconds"]["samples, images"] / len(images)}

    def put_out(self, benchmark: str, **found: Mapping[str, Any]) -> None:
        """Prints the JSON line, and writes it where --out says."""
        asked = {name: value for name, value in vars(self.asked).items() if name != "out"}
        put_out({"benchmark": benchmark, **asked, **found}, self.device, self.asked.out)


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.square(difference).mean()))


def in_words(distances: Mapping[str, float]) -> str:
    """KD (x 1000), FD of the middle layer, patch boundary ratio."""
    kernel, middle, borders = (distances[name] for name in METRICS)
    return f"{1000 * kernel:.0f} · {middle:.0f} · {borders:.2f}"
