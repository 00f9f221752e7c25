"""What the loop asks for at every step: random numbers by position, the learning rate, and what is due."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Batch
from ..flow import Stream, VelocityObjective, drop_classes, fold_seed, logit_normal_times, shift_times
from ..recipe import FlowSection, OptimizerSection


def learning_rate(section: OptimizerSection, step: int, steps: int) -> float:
    """The rate of a step (from 0): linear warm-up, then constant, or a cosine down to 1%; linear cooldown."""
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    cooldown = min(1.0, (steps - step) / section.cooldown_steps) if section.cooldown_steps else 1.0
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)) if section.schedule == "cosine" else 1.0
    return section.lr * warmup * cooldown * cosine


TIMES: dict[str, Callable[[Tensor, FlowSection], Tensor]] = {
    "uniform": lambda u, section: u,
    "logit_normal": lambda u, section: logit_normal_times(u, section.time_mean, section.time_std),
}
"""Schedule times (B,) in [0, 1] from uniform random numbers, by the name of their distribution."""


def draw(
    section: FlowSection, objective: VelocityObjective, batch: Batch, x: Tensor, null_class: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels after class dropout (B,), noise like x, and times (B,): each row from its position in the run.

    So a batch split over processes, or taken up again after a crash, meets the same numbers.
    """
    noise, uniforms = torch.empty_like(x), torch.empty(len(x), 2, device=x.device)
    generator = torch.Generator(x.device)
    for i, position in enumerate(batch.positions):
        generator.manual_seed(fold_seed(seed, Stream.OBJECTIVE, position))
        noise[i].normal_(generator=generator)
        uniforms[i].uniform_(generator=generator)
    r = TIMES[section.time_distribution or objective.times](uniforms[:, 0], section)
    labels = batch.labels.to(x.device, non_blocking=True)
    return (
        drop_classes(labels, uniforms[:, 1], section.class_dropout, null_class),
        noise,
        objective.flow_time(shift_times(r, section.time_shift)),
    )


def is_due(every: int, done: int, steps: int) -> bool:
    """Whether what is done every so many steps (0: never), and after the last one, is due after `done` steps."""
    return bool(every) and (done % every == 0 or done == steps)
