"""The time of one training step, against plain eager code of the release's kind."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import interpolate
from ..model import DiP
from ..processes import autocast
from ..terminal import StartPass
from .contenders import Contender, compare, compare_alone
from .heads import other_heads
from .release import ReleaseDiP, has_releases_form
from .steps import EMA_DECAY, LR, TrainingStep, counted_apart, noise_and_labels
from .timing import Step, ratio


def bench_training(
    model: DiP,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    compiled: bool,
    device: torch.device,
    precision: torch.dtype,
    heads: bool,
    start: StartPass,
) -> dict[str, Any]:
    """Forward and backward pass, AdamW and EMA of `batch` images, with all labels at hand.

    Args:
        compiled: also with compiled blocks; on a CUDA device the plain code, too. What gradient checkpointing costs is
            measured in what is compiled, or else in what is not.
        heads: also each other head, and no head, in plain eager code.

    Returns:
        "steps" and "ceilings" as `compare` makes them, on a CUDA device `compare_alone`; "ratios" within rounds.
    """
    x, y = noise_and_labels(model, size, batch, device)
    makers = _contenders(model, x, y, compiled, precision)
    *_, best = makers
    checkpointing = functools.partial(_ours, model, x, y, compiled, precision, checkpointing=True)

    def other(config: Mapping[str, Any]) -> Contender:
        network = DiP(**config).to(device)
        counted = network if counted_apart(False, device) else None
        return TrainingStep(network, precision).contender(x, y, counted=counted)

    others = {f"{best}, checkpointing": (best, checkpointing)}
    if heads:
        others |= {name: ("ours", functools.partial(other, config)) for name, config in other_heads(model).items()}
    if device.type == "cuda":
        timings = compare_alone(makers | {name: make for name, (_, make) in others.items()}, rounds, device, start)
        return {**timings.record(), "ratios": timings.ratios()}
    contenders = {name: make() for name, make in makers.items()}
    timings = compare(contenders, rounds, device, start)
    result = {**timings.record(), "ratios": timings.ratios()}
    for name, (beside, make) in others.items():
        contenders = {beside: contenders.get(beside) or makers[beside]()}  # the memory of the rest is needed
        pair = compare(contenders | {name: make()}, rounds, device, start)
        result["steps"][name] = pair.rows[name]
        result["ratios"][f"{name} / {beside}"] = ratio(pair.seconds, name, beside)
    return result


def _ours(
    model: DiP, x: Tensor, y: Tensor, compiles: bool, precision: torch.dtype, checkpointing: bool = False
) -> Contender:
    network = copy.deepcopy(model).to(x.device)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if compiles:
        network.compile_repeated_blocks(dynamic=False)
    counted = model if checkpointing or counted_apart(compiles, x.device) else None
    return TrainingStep(network, precision).contender(x, y, counted=counted)


def _contenders(
    model: DiP, x: Tensor, y: Tensor, compiled: bool, precision: torch.dtype
) -> dict[str, Callable[[], Contender]]:
    def plain(compiles: bool) -> Contender:
        network = ReleaseDiP(model).to(x.device)
        if compiles:
            network = network.compiled()
        step = _plain_step(network, x, y, precision)

        def counted(images: int) -> Step:
            return _plain_step(ReleaseDiP(model).to(x.device), x[:images], y[:images], precision)

        eager = counted if counted_apart(compiles, x.device) else None
        return Contender(step, len(x), len(x), precision, model.num_parameters(), eager)

    makers = {}
    if has_releases_form(model):
        makers["plain eager"] = functools.partial(plain, False)
        if compiled and x.device.type == "cuda":
            makers["plain, compiled"] = functools.partial(plain, True)
    makers["ours"] = functools.partial(_ours, model, x, y, False, precision)
    if compiled:
        makers["ours, compiled"] = functools.partial(_ours, model, x, y, True, precision)
    return makers


def _plain_step(network: ReleaseDiP, x: Tensor, y: Tensor, precision: torch.dtype) -> Step:
    network.train()
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)

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
