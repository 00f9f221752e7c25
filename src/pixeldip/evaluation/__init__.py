"""The evaluation suite: FID, sFID, Inception Score, precision and recall as ADM computes them, and more."""

from .image_sets import ArrayImages, ImageSet
from .record import Evaluation, print_evaluation
from .registry import METRICS
from .run import Evaluator, evaluate

__all__ = ["METRICS", "ArrayImages", "Evaluation", "Evaluator", "ImageSet", "evaluate", "print_evaluation"]
