"""The evaluation suite during training, on samples of the averaged weights, always of the same seeds."""

import dataclasses
import re
from typing import Any

from rich.console import Console

from ..data import Source
from ..errors import UserError
from ..evaluation import Evaluation, Evaluator
from ..evaluation.image_sets import SourceImages
from ..model import DiP
from ..pipeline import DiPPipeline
from ..processes import Processes, choose_precision
from ..recipe import Recipe, image_size
from ..sampling import SampledImages
from ..terminal import warn


class TrainingEvaluator:
    """Evaluates a run's model. All processes take part.

    Raises:
        UserError: before the first step, if a metric cannot be had: see `Evaluator`.
    """

    def __init__(self, recipe: Recipe, source: Source, patch_size: int, processes: Processes, console: Console):
        section, size = recipe.evaluation, image_size(recipe.data)
        self.section = dataclasses.replace(section, patch_size=section.patch_size or patch_size)
        self.precision = choose_precision(recipe.training.precision, processes.device)
        quiet = console if console.is_terminal else Console(quiet=True)
        own_images = SourceImages(source, recipe.data.source, size, allow_enlarging=True, skip_broken=True)
        try:
            self.evaluator = Evaluator(self.section, *size, processes, quiet, own_images)
        except UserError as error:
            as_here = re.sub(r"(?<!\S)--(?=[a-z])", "--evaluation.", str(error))  # options of `pixeldip evaluate`
            raise UserError(f"evaluation: {as_here}") from error
        for warning in self.evaluator.warnings:
            warn(console, warning)

    def evaluate(self, model: DiP, pipeline: dict[str, Any]) -> Evaluation:
        """Samples `evaluation.images` images and compares them with the reference."""
        sampler = DiPPipeline(model, **pipeline)
        sampler.set_progress_bar_config(disable=True)
        images = SampledImages(
            sampler,
            self.section,
            range(self.section.images),
            order_seed=0,
            precision=self.precision,
            name="this run",
        )
        return self.evaluator.evaluate(images)
