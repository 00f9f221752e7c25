"""The time of one training step, against plain eager code of the release's kind."""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import interpolate
from ..model import DiP
from ..processes import autocast
from ..training.ema import EMA
from ..training.loss import training_loss
from .contenders import Contender, compare
from .heads import other_heads
from .latency import noise_and_labels
from .release import ReleaseDiP, has_releases_form
from .timing import Step

LR, EMA_DECAY = 1e-4, 0.9999


def bench_training(
    model: DiP,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    compiled: bool,
    device: torch.device,
    precision: torch.dtype,
    heads: bool,
) -> dict[str, Any]:
    """Forward and backward pass, AdamW and EMA of `batch` images, with all labels at hand.

    Args:
        compiled: also with compiled blocks.
        heads: also each other head, and no head, one after another beside ours in plain eager code: all in training
            at once would not fit in a GPU's memory at the paper's size.

    Returns:
        "steps" and "ceilings" as `compare` makes them; "ratios" within rounds.
    """
    x, y = noise_and_labels(model, size, batch, device)
    contenders = _contenders(model.to(device), x, y, compiled, precision)
    comparison = compare(contenders, rounds, device)
    result = {**comparison.record(), "ratios": comparison.ratios()}
    if heads:
        contenders = {"ours": contenders["ours"]}  # the memory of the rest is needed
        for name, config in other_heads(model).items():
            contenders[name] = TrainingStep(DiP(**config).to(device), precision).contender(x, y)
            pair = compare(contenders, rounds, device)
            del contenders[name]
            result["steps"][name] = pair.rows[name]
            result["ratios"] |= pair.ratios()
    return result


class TrainingStep:
    """A model's optimizer and average, and a step of them: step(x, y).

    Args:
        parallel: what is called in the model's place, for instance its DistributedDataParallel.
    """

    def __init__(self, model: DiP, precision: torch.dtype, parallel: nn.Module | None = None):
        self.model, self.precision, self.parallel = model.train(), precision, parallel or model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=model.device.type in ("cpu", "cuda"))
        self.ema, self.steps = EMA(model, EMA_DECAY), 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
        with autocast(x.device, self.precision):
            losses = training_loss(self.parallel, self.model.objective, None, x, y, noise, t)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, self.steps)
        self.steps += 1

    def contender(self, x: Tensor, y: Tensor, counted: Step | None = None) -> Contender:
        step = functools.partial(self, x, y)
        return Contender(step, len(x), self.precision, self.model.num_parameters(), counted)


def _contenders(model: DiP, x: Tensor, y: Tensor, compiled: bool, precision: torch.dtype) -> dict[str, Contender]:
    contenders = {}
    if has_releases_form(model):
        plain = _plain_step(ReleaseDiP(model).to(x.device), x, y, precision)
        contenders["plain eager"] = Contender(plain, len(x), precision, model.num_parameters())
    contenders["ours"] = eager = TrainingStep(copy.deepcopy(model), precision).contender(x, y)
    if compiled:
        network = copy.deepcopy(model)
        network.compile_repeated_blocks(dynamic=False)
        contenders["ours, compiled"] = TrainingStep(network, precision).contender(x, y, counted=eager.step)
    return contenders


def _plain_step(network: ReleaseDiP, x: Tensor, y: Tensor, precision: torch.dtype) -> Step:
    network.train()
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, foreach=False)

    def step() -> None:
        noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
        with autocast(x.device, precision):
            v = network(interpolate(x, noise, t), t, y)
        F.mse_loss(v, x - noise).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters()):
                kept.mul_(EMA_DECAY).add_(new, alpha=1 - EMA_DECAY)

    return step
