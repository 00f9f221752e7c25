"""The path, objectives, solvers and guidance: functions of callables, free of the network."""

from .guidance import check_interval, guided_velocity
from .noise import LARGEST_SEED, SampleNoise, Stream, fold_seed, seeded_normal
from .objectives import OBJECTIVES, VelocityObjective
from .path import (
    VelocityNetwork,
    clean_image,
    drop_classes,
    interpolate,
    logit_normal_times,
    shift_times,
    velocity,
)
from .schedulers import check_flow_scheduler, follow_scheduler, is_default_scheduler, set_times
from .solvers import SOLVERS, evaluations, is_stochastic, start_state, steps_within, time_grid

__all__ = [
    "LARGEST_SEED",
    "OBJECTIVES",
    "SOLVERS",
    "SampleNoise",
    "Stream",
    "VelocityNetwork",
    "VelocityObjective",
    "check_flow_scheduler",
    "check_interval",
    "clean_image",
    "drop_classes",
    "evaluations",
    "fold_seed",
    "follow_scheduler",
    "guided_velocity",
    "interpolate",
    "is_default_scheduler",
    "is_stochastic",
    "logit_normal_times",
    "seeded_normal",
    "set_times",
    "shift_times",
    "start_state",
    "steps_within",
    "time_grid",
    "velocity",
]
