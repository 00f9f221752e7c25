"""Random numbers that belong to an image, not to a batch, a process or a device's global state."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What is drawn at random: each from numbers of its own, keyed (seed, stream, …)."""

    ORDER = 0
    FLIP = 1
    INITIALISATION = 2
    OBJECTIVE = 3
    CLASS_ORDER = 4
    REFERENCE_CHOICE = 5
    FLOOR = 6
    FRESH_NOISE = 7
    VALIDATION = 8


def fold_seed(*integers: int) -> int:
    """One 63-bit seed from several non-negative integers, well mixed, the same on every machine."""
    return int(np.random.SeedSequence(integers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded_normal(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal (len(seeds), *shape), row i from seeds[i] alone.

    Drawn on the CPU whatever the device, so that a seed is the same image everywhere.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)
