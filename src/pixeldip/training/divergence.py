"""Losses and gradients that are not finite: the step is left out at once, the policy decides at the next look."""

import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..data import EpochOrder
from ..errors import UserError
from ..processes import Processes
from ..recipe import TrainingSection
from .failures import again


def spreading(loss: Tensor) -> Tensor:
    """The loss, its gradient made NaN if it is not finite itself, so that every process meets it in the norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


class Watch:
    """Losses and gradient norms of the steps since the last look, on the device: no step waits for the host.

    A step diverges if its gradient norm, the same in all processes, is not finite or above `training.gradient_limit`.

    Args:
        order: of the images, for the record of a step that diverged.
    """

    def __init__(self, training: TrainingSection, order: EpochOrder, processes: Processes):
        self.training, self.order, self.processes = training, order, processes
        self._limit = training.gradient_limit or math.inf
        self._losses: dict[str, Tensor] = {}
        self._unseen: list[tuple[int, dict[str, Tensor], Tensor]] = []
        self._sound: list[dict[str, float]] = []
        self._consecutive = 0

    def part(self, losses: dict[str, Tensor]) -> None:
        """Adds one of a step's `training.gradient_accumulation` parts."""
        for name, value in losses.items():
            share = value.detach().float() / self.training.gradient_accumulation
            self._losses[name] = self._losses[name] + share if name in self._losses else share

    def step(self, step: int, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Takes the optimizer's step (from 0) unless it diverged; then weights and moments stay as they are."""
        diverged = ~(norm.isfinite() & (norm <= self._limit))
        if optimizer.defaults["fused"]:
            optimizer.found_inf = diverged.float()  # as for GradScaler: decided on the device
            optimizer.step()
        elif not diverged:
            optimizer.step()
        self._unseen.append((step, self._losses, norm.detach()))
        self._losses = {}

    def look(self) -> list[dict[str, Any]]:
        """What is to be recorded of the steps since the last look that diverged; all processes take part."""
        if not self._unseen:
            return []
        steps, losses, norms = zip(*self._unseen, strict=True)
        self._unseen = []
        means = self.processes.mean(torch.stack([torch.stack(list(each.values())) for each in losses])).tolist()
        diverged = []
        for step, values, norm in zip(steps, means, torch.stack(norms).tolist(), strict=True):
            named = dict(zip(losses[0], values, strict=True))
            if math.isfinite(norm) and norm <= self._limit:
                self._sound.append({**named, "gradient_norm": norm})
                self._consecutive = 0
            else:
                self._consecutive += 1
                size = self.training.batch_size
                rows = [self.order[position][1] for position in range(step * size, (step + 1) * size)]
                counted = {"gradient_norm": norm, "consecutive": self._consecutive}
                policy = self.training.on_divergence
                diverged.append({"step": step + 1, **named, **counted, "policy": policy, "rows": rows})
        return diverged

    def means(self) -> dict[str, float]:
        """Mean losses of the sound steps looked at since the last call, and the last one's norm; {} without any."""
        sound, self._sound = self._sound, []
        if not sound:
            return {}
        means = {name: sum(each[name] for each in sound) / len(sound) for name in sound[0]}
        return {**means, "gradient_norm": round(sound[-1]["gradient_norm"], 6)}


def check_divergence(training: TrainingSection, run: Path, diverged: list[dict[str, Any]]) -> None:
    """Ends the run if the policy says so.

    Raises:
        UserError: at the first step that diverged, or, where steps are skipped, at the last of too many in a row.
    """
    if diverged and training.on_divergence == "stop":
        skip = "with --training.on-divergence skip, which leaves such steps out, the same command"
        _stop(diverged[0], f"{skip} {again(run)}; or start")
    for step in diverged:
        if step["consecutive"] >= training.skip_limit:
            _stop(step, f"{step['consecutive']} steps in a row were left out (training.skip_limit); start")


def _stop(step: dict[str, Any], advice: str) -> NoReturn:
    raise UserError(
        f"step {step['step']} diverged: loss {step['loss']:.4g}, gradient norm {step['gradient_norm']:.4g}. It was "
        f"left out, and metrics.jsonl names its images; {advice} again in another folder with a lower optimizer.lr or "
        "training.precision fp32"
    )
