"""The time of one guided step, against the release's way of working and against what the device can do."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..model import DiP
from ..processes import autocast, computes_in_int8
from ..replay import recordable
from ..terminal import StartPass
from .contenders import Contender, compare
from .heads import other_heads
from .latent import STEPS as LATENT_STEPS
from .latent import LatentModel
from .release import ReleaseDiP, has_releases_form, release_step
from .steps import DT, GUIDANCE, STEPS, TIME, noise_and_labels, replayed, sampling_contender
from .timing import Step

DIT, VAE = "DiT-XL/2 in latents", "its VAE, one decoding"
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def bench_latency(
    model: DiP,
    size: tuple[int, int],
    batch: int,
    rounds: int,
    compiled: bool,
    device: torch.device,
    precision: torch.dtype,
    heads: bool,
    latent: bool,
    start: StartPass,
) -> dict[str, Any]:
    """One Euler step of guidance, both branches, for `batch` images of `size` (height, width).

    Args:
        compiled: also with compiled blocks, the release's way, too, and ours, where the device computes in it, in int8.
        precision: float32 or bfloat16, of what is compiled, of other heads and of DiT-XL/2; the plain code is timed in
            both. Ours in it is also timed as the commands sample: modulation computed ahead where there is room for
            it, and replayed from a CUDA graph where that pays.
        heads: also each other head, and no head.
        latent: also DiT-XL/2 with its VAE.

    Returns:
        "steps" and "ceilings" as `compare` makes them; "images": seconds of a whole batch, in 100 Euler steps, or 250
        of DiT-XL/2 and the VAE, and at the limit; "ratios" within rounds, other heads' to ours not compiled either;
        "errors" of the guided velocity against the first row's, as a share of its standard deviation.
    """
    x, y = noise_and_labels(model, size, batch, device)
    plain = f"ours, {SHORT[precision]}"
    contenders = _contenders(model.to(device).eval().requires_grad_(False), x, y, compiled, precision)
    errors = _errors({name: contender.step for name, contender in contenders.items()}, x)
    others = other_heads(model) if heads else {}
    for name, config in others.items():
        other = DiP(**config).eval().requires_grad_(False).to(device).type(precision)
        contenders[name] = sampling_contender(other, x, y)
    if latent:
        other = LatentModel(size, batch, device, precision)
        images = batch / LATENT_STEPS
        contenders[DIT] = Contender(other.step(), batch, images, precision, other.transformer.num_parameters())
        contenders[VAE] = Contender(other.decode(), batch, batch, precision, other.vae.num_parameters())
    timings = compare(contenders, rounds, device, start)
    ratios = timings.ratios(dict.fromkeys(others, plain))
    return {**timings.record(), "images": _whole_images(timings.rows), "ratios": ratios, "errors": errors}


def _contenders(model: DiP, x: Tensor, y: Tensor, compiled: bool, precision: torch.dtype) -> dict[str, Contender]:
    contenders = {}
    if has_releases_form(model):
        release = ReleaseDiP(model).to(x.device)
        contenders["release, fp32"] = _release(release, x, y, torch.float32)
        contenders["release, autocast"] = _release(release, x, y, torch.bfloat16)
        if compiled:
            way = "autocast" if precision == torch.bfloat16 else "fp32"
            contenders[f"release, {way}, compiled"] = _release(release.compiled(), x, y, precision, release)
    in_both = {torch.float32: model, torch.bfloat16: copy.deepcopy(model).type(torch.bfloat16)}
    for dtype, network in in_both.items():
        contenders[f"ours, {SHORT[dtype]}"] = sampling_contender(network, x, y)
    plain, ours = f"ours, {SHORT[precision]}", in_both[precision]
    networks = {plain: ours}
    if compiled:
        fast = {f"{plain}, compiled": copy.deepcopy(ours)}
        if computes_in_int8(x.device):
            fast["ours, int8, compiled"] = integers = copy.deepcopy(ours)
            integers.quantize_to_int8()
        for network in fast.values():
            network.compile_repeated_blocks(dynamic=False)
        networks |= fast
    for name, network in networks.items():
        contenders[name] = sampling_contender(network, x, y, counted=ours)
        called = replayed(network)
        if recordable(x):
            contenders[f"{name}, graphs"] = sampling_contender(called, x, y, counted=ours)
        elif called.computes_ahead(torch.stack([y, y])):
            contenders[f"{name}, modulation ahead"] = sampling_contender(called, x, y, counted=ours)
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


def _release(
    network: ReleaseDiP, x: Tensor, y: Tensor, precision: torch.dtype, counted: ReleaseDiP | None = None
) -> Contender:
    """Args: counted: the same network in plain eager code, if this one's FLOPs cannot be counted."""

    @torch.no_grad()
    def step() -> Tensor:
        with autocast(x.device, precision):
            return release_step(network, x, TIME, DT, y, network.null_class, GUIDANCE)

    def plain(images: int) -> Step:
        return _release(counted, x[:1].expand(images, -1, -1, -1), y[:1].expand(images), precision).step

    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Contender(step, len(x), len(x) / STEPS, precision, parameters, plain if counted else None)
