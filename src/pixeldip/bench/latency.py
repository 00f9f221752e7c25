"""The time of one guided step, against the release's way of working and against what the device can do."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..flow import guided_velocity
from ..model import DiP
from ..processes import autocast
from .release import ReleaseDiP, release_step
from .timing import Ceilings, Step, Times, count_flops, ratio, take_turns

GUIDANCE, TIME, DT = 4.0, 0.5, 0.01


def bench_latency(
    model: DiP, size: tuple[int, int], batch: int, rounds: int, compiled: bool, device: torch.device
) -> dict[str, Any]:
    """One Euler step of guidance, both branches, for `batch` images of `size` (height, width).

    Returns:
        "steps": milliseconds, FLOPs and the share of the ceiling by name; "ratios"; "ceilings"; "errors" against the
        release's way in float32, as a share of the velocity's standard deviation.
    """
    x = torch.randn(batch, model.config.in_channels, *size, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    model = model.to(device).eval().requires_grad_(False)
    half = copy.deepcopy(model).type(torch.bfloat16)
    networks: dict[str, tuple[DiP, torch.dtype]] = {"ours, fp32": (model, torch.float32)}
    networks["ours, bf16"] = half, torch.bfloat16
    if compiled:
        blocks = copy.deepcopy(half)
        blocks.compile_repeated_blocks(dynamic=False)
        networks["ours, bf16, compiled"] = blocks, torch.bfloat16
    steps: dict[str, Step] = {name: _our_step(network, x, y) for name, (network, _) in networks.items()}
    precisions = {name: precision for name, (_, precision) in networks.items()}
    if model.config.head == "unet" and model.config.placement == "post" and model.config.prediction == "velocity":
        release = ReleaseDiP(model).to(device)
        steps = {
            "release, fp32": _release_step(release, x, y, model.config.num_classes, torch.float32),
            "release, autocast": _release_step(release, x, y, model.config.num_classes, torch.bfloat16),
            **steps,
        }
        precisions |= {"release, fp32": torch.float32, "release, autocast": torch.bfloat16}
    seconds = take_turns(steps, rounds, device)
    ceilings = {precision: Ceilings.measure(device, precision) for precision in (torch.float32, torch.bfloat16)}
    wanted = next(iter(steps.values()))()
    rows, errors = {}, {}
    for name, step in steps.items():
        flops = count_flops(_our_step(half, x, y) if name.endswith("compiled") else step)
        precision = precisions[name]
        weights = model.num_parameters() * precision.itemsize
        floor = ceilings[precision].floor(flops, weights)
        times = Times.of(seconds[name])
        rows[name] = {
            "milliseconds": 1e3 * times.median,
            "spread": 1e3 * times.spread,
            "gflops": flops / 1e9,
            "floor_milliseconds": 1e3 * floor,
            "share_of_limit": floor / times.median,
        }
        errors[name] = ((step() - wanted).float().std() / (DT * wanted.float().std())).item()
    fastest = min(rows, key=lambda name: rows[name]["milliseconds"])
    return {
        "steps": rows,
        "ratios": {f"{name} / {fastest}": ratio(seconds, name, fastest) for name in steps if name != fastest},
        "errors": errors,
        "ceilings": {
            str(precision).removeprefix("torch."): {"gflops": c.flops / 1e9, "gigabytes_per_second": c.bandwidth / 1e9}
            for precision, c in ceilings.items()
        },
    }


def _our_step(network: DiP, x: Tensor, y: Tensor) -> Step:
    velocity = guided_velocity(network, y, network.config.num_classes, GUIDANCE)

    @torch.no_grad()
    def step() -> Tensor:
        return x + DT * velocity(x, TIME, TIME)

    return step


def _release_step(network: ReleaseDiP, x: Tensor, y: Tensor, null_class: int, precision: torch.dtype) -> Step:
    @torch.no_grad()
    def step() -> Tensor:
        with autocast(x.device, precision):
            return release_step(network, x, TIME, DT, y, null_class, GUIDANCE)

    return step
