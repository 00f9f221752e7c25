"""The path, its loss, solvers and guidance: functions of callables, free of the network."""

from .guidance import guided_velocity
from .noise import Stream, fold_seed, seeded_normal
from .path import (
    clean_image,
    drop_classes,
    interpolate,
    logit_normal_times,
    shift_times,
    uniform_times,
    velocity,
    velocity_loss,
)
from .solvers import SOLVERS, evaluations, time_grid

__all__ = [
    "SOLVERS",
    "Stream",
    "clean_image",
    "drop_classes",
    "evaluations",
    "fold_seed",
    "guided_velocity",
    "interpolate",
    "logit_normal_times",
    "seeded_normal",
    "shift_times",
    "time_grid",
    "uniform_times",
    "velocity",
    "velocity_loss",
]
