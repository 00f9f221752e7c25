"""Training: the loop, the averaged weights, checkpoints, processes, progress."""

from .trainer import Outcome, train

__all__ = ["Outcome", "train"]
