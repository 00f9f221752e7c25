"""The time of one training step, against plain eager code of the release's kind."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flow import interpolate
from ..model import DiP
from ..processes import autocast, precision_name
from ..training.ema import EMA
from ..training.loss import training_loss
from .release import ReleaseDiP, has_releases_form
from .timing import Ceilings, Step, Times, count_flops, ratio, take_turns

LR, EMA_DECAY = 1e-4, 0.9999


def bench_training(
    model: DiP,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    compiled: bool,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, Any]:
    """Forward and backward pass, AdamW and EMA of `batch` images, with all labels at hand.

    Returns:
        "steps": milliseconds, images/s, FLOPs and the share of the ceiling by name; "ratios"; "ceilings".
    """
    x = torch.randn(batch, model.config.in_channels, *size, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    model = model.to(device)
    steps: dict[str, Step] = {}
    if has_releases_form(model):
        steps["plain eager"] = _plain_step(ReleaseDiP(model).to(device), x, y, precision)
    steps["ours"] = _our_step(copy.deepcopy(model), x, y, precision)
    if compiled:
        network = copy.deepcopy(model)
        network.compile_repeated_blocks(dynamic=False)
        steps["ours, compiled"] = _our_step(network, x, y, precision)
    seconds = take_turns(steps, rounds, device)
    ceiling = Ceilings.measure(device, precision)
    counted = {name: count_flops(step) for name, step in steps.items() if name != "ours, compiled"}
    rows = {}
    for name in steps:
        times, flops = Times.of(seconds[name]), counted.get(name, counted["ours"])
        rows[name] = {
            "milliseconds": 1e3 * times.median,
            "spread": 1e3 * times.spread,
            "images_per_second": batch / times.median,
            "gflops": flops / 1e9,
            "share_of_limit": flops / ceiling.flops / times.median,
        }
    fastest = min(rows, key=lambda name: rows[name]["milliseconds"])
    return {
        "steps": rows,
        "ratios": {f"{name} / {fastest}": ratio(seconds, name, fastest) for name in steps if name != fastest},
        "ceilings": {precision_name(precision): {"gflops": ceiling.flops / 1e9}},
    }


def _our_step(model: DiP, x: Tensor, y: Tensor, precision: torch.dtype) -> Step:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    ema, count = EMA(model, EMA_DECAY), iter(range(10**9))

    def step() -> None:
        noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
        with autocast(x.device, precision):
            losses = training_loss(model, model.objective, None, x, y, noise, t)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, next(count))

    return step


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
