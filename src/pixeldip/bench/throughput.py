"""Images per second against the batch size, sampling and training."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..model import DiP
from ..terminal import StartPass
from .contenders import Contender, compare
from .steps import TrainingStep, counted_apart, noise_and_labels, replayed, sampling_contender


def bench_throughput(
    model: DiP,
    size: tuple[int, int],
    batches: Sequence[int],
    rounds: int,
    compiled: bool,
    device: torch.device,
    precision: torch.dtype,
    start: StartPass,
) -> dict[str, Any]:
    """Guided Euler steps, 100 to an image, and training steps, for each batch size.

    Args:
        compiled: with compiled blocks. Sampling is as the commands do it: modulation computed ahead, and on a CUDA
            device, where it pays, replayed from graphs.

    Returns:
        "steps" and "ceilings" as `compare` makes them; "series": by what was done, [batch, images/s] pairs. On a GPU
        with dense attention the share of the limit is what others call MFU, against the measured ceiling.
    """
    sampled = copy.deepcopy(model).eval().requires_grad_(False).to(device).type(precision)
    trainer = TrainingStep(model.to(device), precision)
    eager, plain = sampled, model
    if compiled:
        eager, plain = copy.deepcopy(sampled), copy.deepcopy(model)
        sampled.compile_repeated_blocks(dynamic=False)
        model.compile_repeated_blocks(dynamic=False)
    trained_apart = plain if counted_apart(compiled, device) else None
    contenders: dict[str, Contender] = {}
    for batch in batches:
        x, y = noise_and_labels(model, size, batch, device)
        contenders[f"sampling, {batch}"] = sampling_contender(replayed(sampled), x, y, counted=eager)
        contenders[f"training, {batch}"] = trainer.contender(x, y, counted=trained_apart)
    timings = compare(contenders, rounds, device, start)
    series = {
        done: [[batch, timings.rows[f"{done}, {batch}"]["images_per_second"]] for batch in batches]
        for done in ("sampling", "training")
    }
    return {**timings.record(), "series": series}
