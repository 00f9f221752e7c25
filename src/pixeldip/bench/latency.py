"""The time of one guided step, against the release's way of working and against what the device can do."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..flow import guided_velocity
from ..model import DiP
from ..processes import autocast, precision_name
from .latent import STEPS as LATENT_STEPS
from .latent import LatentModel
from .release import ReleaseDiP, has_releases_form, release_step
from .timing import Ceilings, Step, Times, count_flops, ratio, take_turns

GUIDANCE, TIME, DT = 4.0, 0.5, 0.01
DIT, VAE = "DiT-XL/2 in latents, bf16", "its VAE, one decoding"
STEPS = 100  # of Euler's method, as in Table 1


def bench_latency(
    model: DiP, size: tuple[int, int], batch: int, rounds: int, compiled: bool, device: torch.device, latent: bool
) -> dict[str, Any]:
    """One Euler step of guidance, both branches, for `batch` images of `size` (height, width).

    Args:
        compiled: also with compiled blocks.
        latent: also DiT-XL/2 with its VAE, in bf16.

    Returns:
        "steps": milliseconds, FLOPs and the share of the limit by name; "images": seconds of a whole batch, in 100
        Euler steps, or 250 of DiT-XL/2 and the VAE, and at the limit; "ratios" within rounds; "ceilings"; "errors" of
        the guided velocity against the first row's, as a share of its standard deviation.
    """
    x = torch.randn(batch, model.config.in_channels, *size, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    contenders = _contenders(model.to(device).eval().requires_grad_(False), x, y, compiled)
    errors = _errors({name: contender.step for name, contender in contenders.items()}, x)
    if latent:
        other = LatentModel(size, batch, device, torch.bfloat16)
        contenders[DIT] = _Contender(other.step(), torch.bfloat16, other.transformer.num_parameters())
        contenders[VAE] = _Contender(other.decode(), torch.bfloat16, other.vae.num_parameters())
    steps = {name: contender.step for name, contender in contenders.items()}
    seconds = take_turns(steps, rounds, device)
    ceilings = {precision: Ceilings.measure(device, precision) for precision in (torch.float32, torch.bfloat16)}
    rows = {}
    for name, contender in contenders.items():
        flops = count_flops(contender.counted or contender.step)
        weight_bytes = contender.parameters * contender.precision.itemsize
        floor, times = ceilings[contender.precision].floor(flops, weight_bytes), Times.of(seconds[name])
        rows[name] = {
            "milliseconds": 1e3 * times.median,
            "spread": 1e3 * times.spread,
            "gflops": flops / 1e9,
            "floor_milliseconds": 1e3 * floor,
            "share_of_limit": floor / times.median,
        }
    fastest = min((name for name in rows if name.startswith("ours")), key=lambda name: rows[name]["milliseconds"])
    return {
        "steps": rows,
        "images": _whole_images(rows),
        "ratios": {f"{name} / {fastest}": ratio(seconds, name, fastest) for name in steps if name != fastest},
        "errors": errors,
        "ceilings": {
            precision_name(precision): {"gflops": c.flops / 1e9, "gigabytes_per_second": c.bandwidth / 1e9}
            for precision, c in ceilings.items()
        },
    }


@dataclass
class _Contender:
    """counted: the same step as plain eager code, for those whose FLOPs cannot be counted."""

    step: Step
    precision: torch.dtype
    parameters: int
    counted: Step | None = None


def _contenders(model: DiP, x: Tensor, y: Tensor, compiled: bool) -> dict[str, _Contender]:
    count, null_class = model.num_parameters(), model.config.num_classes
    contenders = {}
    if has_releases_form(model):
        release = ReleaseDiP(model).to(x.device)
        for name, precision in {"release, fp32": torch.float32, "release, autocast": torch.bfloat16}.items():
            contenders[name] = _Contender(_release_step(release, x, y, null_class, precision), precision, count)
    half = copy.deepcopy(model).type(torch.bfloat16)
    eager = _our_step(half, x, y)
    contenders["ours, fp32"] = _Contender(_our_step(model, x, y), torch.float32, count)
    contenders["ours, bf16"] = _Contender(eager, torch.bfloat16, count)
    if compiled:
        blocks = copy.deepcopy(half)
        blocks.compile_repeated_blocks(dynamic=False)
        contenders["ours, bf16, compiled"] = _Contender(_our_step(blocks, x, y), torch.bfloat16, count, counted=eager)
    return contenders


def _errors(steps: Mapping[str, Step], x: Tensor) -> dict[str, float]:
    """How far each step from x leads from the first one's, as a share of what the first one adds."""
    first, *_ = results = [step().float() - x for step in steps.values()]
    return {name: ((moved - first).std() / first.std()).item() for name, moved in zip(steps, results)}


def _whole_images(rows: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds of a batch of images from noise to pixels, as measured and at the limit."""
    whole = {}
    for name, row in rows.items():
        if name == VAE:
            continue
        steps, after = (LATENT_STEPS, rows[VAE]) if name == DIT else (STEPS, None)
        whole[name] = {
            "steps": steps,
            "seconds": (steps * row["milliseconds"] + (after["milliseconds"] if after else 0)) / 1e3,
            "limit": (steps * row["floor_milliseconds"] + (after["floor_milliseconds"] if after else 0)) / 1e3,
        }
    return whole


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
