"""The evaluation suite during training, on samples of the averaged weights, always of the same seeds."""

import dataclasses
from typing import Any

from rich.console import Console

from ..evaluation import Evaluation, Evaluator
from ..model import DiP
from ..pipeline import DiPPipeline
from ..processes import Processes, choose_precision
from ..recipe import Recipe, image_size
from ..sampling import SampledImages


class TrainingMetrics:
    """Measures a run's model. All processes take part.

    Raises:
        UserError: before the first step, if a metric cannot be had: see `Evaluator`.
    """

    def __init__(self, recipe: Recipe, patch_size: int, processes: Processes, console: Console):
        section, data = recipe.evaluation, recipe.data
        self.section = dataclasses.replace(
            section,
            patch_size=patch_size,
            reference=section.reference or data.source,
            reference_split=section.reference_split if section.reference else data.split,
            train_images=section.train_images or data.source,
            train_split=section.train_split if section.train_images else data.split,
        )
        self.precision = choose_precision(recipe.training.precision, processes.device)
        quiet = console if console.is_terminal else Console(quiet=True)
        self.evaluator = Evaluator(self.section, *image_size(data), processes, quiet)
        for warning in self.evaluator.warnings:
            console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def measure(self, model: DiP, pipeline: dict[str, Any]) -> Evaluation:
        """Samples `evaluation.images` images and compares them with the reference."""
        images = SampledImages(
            DiPPipeline(model, **pipeline),
            self.section,
            range(self.section.images),
            order_seed=0,
            precision=self.precision,
            name="this run",
        )
        return self.evaluator.evaluate(images)
