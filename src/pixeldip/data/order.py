"""Which image stands at which place of a run: functions of (seed, epoch, index) alone."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from ..flow import Stream


class EpochOrder:
    """The endless order of a run over n images: a fresh permutation for every epoch, none left out."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epoch: int | None = None
        self._permutation = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of the image at a position of the run."""
        epoch, place = divmod(position, self.n)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng((self.seed, Stream.ORDER, epoch)).permutation(self.n)
            self._epoch = epoch
        return epoch, int(self._permutation[place])


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """A fair coin for each image in each epoch."""
    return bool(np.random.default_rng((seed, Stream.FLIP, epoch, index)).integers(2))


class PositionSampler(Sampler[list[int]]):
    """The positions of every batch of one process, from `first_step` to `steps`.

    The global batch of step k holds positions k * B ... k * B + B - 1; process r of R takes the
    r-th of R equal runs of each of the step's `accumulation` parts.
    """

    def __init__(self, batch_size: int, first_step: int, steps: int, accumulation: int, rank: int, world_size: int):
        self.batch_size, self.first_step, self.steps = batch_size, first_step, steps
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.micro_batch = batch_size // (accumulation * world_size)

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            for part in range(self.accumulation):
                start = step * self.batch_size + (part * self.world_size + self.rank) * self.micro_batch
                yield list(range(start, start + self.micro_batch))
