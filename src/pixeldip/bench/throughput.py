"""Images per second against the batch size, sampling and training."""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..model import DiP
from .contenders import Contender, compare
from .latency import noise_and_labels, sampling_contender
from .training import TrainingStep


def bench_throughput(
    model: DiP,
    size: tuple[int, int],
    batches: Sequence[int],
    rounds: int,
    compiled: bool,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, Any]:
    """Guided Euler steps with bf16 weights, 100 to an image, and training steps, for each batch size.

    Args:
        compiled: with compiled blocks.

    Returns:
        "steps" and "ceilings" as `compare` makes them; "series": by what was done, [batch, images/s] pairs. On a GPU
        with dense attention the share of the limit is what others call MFU, against the measured ceiling.
    """
    half = copy.deepcopy(model).eval().requires_grad_(False).to(device).type(torch.bfloat16)
    trainer = TrainingStep(model.to(device), precision)
    eager, eager_trainer = None, None
    if compiled:
        eager, eager_trainer = copy.deepcopy(half), TrainingStep(copy.deepcopy(model), precision)
        half.compile_repeated_blocks(dynamic=False)
        model.compile_repeated_blocks(dynamic=False)
    contenders: dict[str, Contender] = {}
    for batch in batches:
        x, y = noise_and_labels(model, size, batch, device)
        counted = sampling_contender(eager, x, y).step if eager else None
        contenders[f"sampling, {batch}"] = sampling_contender(half, x, y, counted)
        counted = functools.partial(eager_trainer, x, y) if eager_trainer else None
        contenders[f"training, {batch}"] = trainer.contender(x, y, counted)
    comparison = compare(contenders, rounds, device)
    series = {
        done: [[batch, comparison.rows[f"{done}, {batch}"]["images_per_second"]] for batch in batches]
        for done in ("sampling", "training")
    }
    return {**comparison.record(), "series": series}
