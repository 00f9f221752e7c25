"""Random numbers that belong to an image, not to a batch, a process or a device's global state."""

import math
import sys
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, is_out_of_memory

LARGEST_SEED = 2**63 - 1


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
    """Standard normal float32 (len(seeds), *shape), row i from seeds[i] alone.

    Drawn on the CPU whatever the device, and in float32 whatever torch's default, so that a seed is the same image
    everywhere.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float32) for s in seeds]
    return torch.stack(rows).to(device)


class SampleNoise:
    """All random numbers of one call, from a seed per image or from generators.

    Attributes:
        start: the noise (B, C, H, W) sampling starts from.
        generators: for schedulers that draw fresh noise.

    Raises:
        UserError: if there is no memory for it.
    """

    def __init__(
        self,
        seeds: Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        count: int,
        shape: tuple[int, ...],
        device: torch.device,
    ):
        self.seeds = list(range(count)) if seeds is None and generator is None else seeds
        self.count, self.shape, self.device = count, shape, device
        if self.seeds is None:
            self.generators = generator
        else:
            fresh = [fold_seed(seed, Stream.FRESH_NOISE) for seed in self.seeds]
            self.generators = [torch.Generator().manual_seed(seed) for seed in fresh]
        needed = torch.float32.itemsize * count * math.prod(shape)
        try:
            if needed > sys.maxsize:  # no tensor has so many bytes
                raise MemoryError
            self.start = self._normal() if self.seeds is None else seeded_normal(self.seeds, shape, device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"images of {shape[1]}x{shape[2]} pixels (height x width): there is no memory for the noise alone of "
                f"{count}, {needed / 2**30:.1f} GiB; ask for fewer or smaller ones"
            ) from error

    def fresh(self, step: int) -> Tensor:
        """Noise (B, C, H, W) that a step adds."""
        if self.seeds is None:
            return self._normal()
        return seeded_normal(
            [fold_seed(seed, Stream.FRESH_NOISE, step) for seed in self.seeds], self.shape, self.device
        )

    def _normal(self) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor  # as in `schedulers`

        return randn_tensor((self.count, *self.shape), self.generators, self.device, torch.float32)
