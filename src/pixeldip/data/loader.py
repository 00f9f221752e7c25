"""Batches of a run: decoded, cropped, in an order that depends on (seed, position) alone."""

import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..processes import Processes
from ..recipe import DataSection, image_size
from ..terminal import say
from .order import EpochOrder, PositionSampler, is_flipped
from .sources import Source
from .transforms import BrokenImage, centre_crop

MEMORY_LIMIT = 2**30
_SIZES_LOOKED_AT = 200


@dataclass
class Batch:
    """images uint8 (B, 3, H, W), labels (B,), positions of the images in the run (B entries)."""

    images: Tensor
    labels: Tensor
    positions: list[int]
    broken: dict[int, str]
    """Rows that could not be read on the way to this batch, and why."""

    def pin_memory(self) -> "Batch":
        """As `DataLoader` asks for: in memory that a GPU copies from while the CPU goes on."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class TrainingImages(Dataset):
    """Images by position in the run. A broken one gives its place to the next row that can be read."""

    def __init__(self, source: Source, section: DataSection, seed: int):
        self.source, self.section, self.seed = source, section, seed
        self.size = image_size(section)
        self.order = EpochOrder(len(source), seed)
        self._memory: np.ndarray | None = None
        self._labels: np.ndarray | None = None
        self.broken: dict[int, str] = {}
        """Rows known to be unreadable, and why; filled by `load_into_memory`."""

    def __len__(self) -> int:
        return len(self.source)

    def warnings(self) -> list[str]:
        """That pictures are smaller than they are trained at, by the headers of some, spread over the source."""
        rows = np.linspace(0, len(self.source.rows) - 1, min(len(self.source.rows), _SIZES_LOOKED_AT)).astype(int)
        sizes = [size for size in map(self.source.size, rows.tolist()) if size]
        small = [size for size in sizes if size[0] < self.size[0] or size[1] < self.size[1]]
        if not small:
            return []
        looked_at = " looked at" if len(rows) < len(self.source.rows) else ""
        height, width = min(small, key=math.prod)
        return [
            f"data.source {self.section.source}: {len(small)} of {len(sizes)} images{looked_at} are smaller than "
            f"{self.size[0]}x{self.size[1]} (one is {height}x{width}); they are enlarged, and the model learns their "
            "blur: lower data.resolution, or leave them out"
        ]

    def fits_in_memory(self) -> bool:
        height, width = self.size
        if self.section.in_memory is not None:
            return self.section.in_memory
        return 3 * height * width * len(self) <= MEMORY_LIMIT

    def load_into_memory(self, console: Console) -> None:
        """Decodes every image once.

        Raises:
            UserError: if too many cannot be read.
        """

        def attempt(index: int) -> tuple[np.ndarray | None, int]:
            try:
                return self._decode(index)
            except BrokenImage as error:
                self.broken[index] = str(error)
                return None, 0

        height, width = self.size
        memory = np.zeros((len(self), height, width, 3), np.uint8)
        labels = np.zeros(len(self), np.int64)
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(attempt, range(len(self)))
            for i, (image, label) in enumerate(
                track(decoded, "Reading images", len(self), console=console, transient=True)
            ):
                labels[i] = label
                if image is not None:
                    memory[i] = image
        _check_broken(self.broken, self.source, self.section)
        _report_broken(self.broken, console)
        self._memory, self._labels = memory, labels

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        picture, label, _ = self.source.picture(index)
        return centre_crop(picture, *self.size), label

    def _load(self, index: int) -> tuple[np.ndarray, int]:
        if self._memory is None or self._labels is None:
            return self._decode(index)
        if index in self.broken:
            raise BrokenImage(self.broken[index])
        return self._memory[index], int(self._labels[index])

    def __getitem__(self, position: int) -> tuple[np.ndarray, int, int, dict[int, str]]:
        epoch, index = self.order[position]
        broken: dict[int, str] = {}
        while True:
            try:
                image, label = self._load(index)
                break
            except BrokenImage as error:
                broken[index] = str(error)
                _check_broken(broken, self.source, self.section)
                index = (index + 1) % len(self)
        if self.section.flip and is_flipped(self.seed, epoch, index):
            image = image[:, ::-1]
        return image, label, position, broken


def _check_broken(broken: dict[int, str], source: Source, section: DataSection) -> None:
    """Raises UserError if the rows found broken so far are more than the recipe allows."""
    if len(broken) > min(section.max_broken * len(source), len(source) - 1):
        first = "\n  ".join(list(broken.values())[:5])
        raise UserError(
            f"data.source {section.source}: {len(broken)} of {len(source)} images cannot be read, more than "
            f"data.max_broken = {section.max_broken:g} allows; repair or remove them, or raise it:\n  {first}"
        )


def _report_broken(broken: dict[int, str], console: Console) -> None:
    for why in broken.values():
        say(console, f"skipped, cannot be read: {why}", "yellow")


def _collate(items: list[tuple[np.ndarray, int, int, dict[int, str]]]) -> Batch:
    images, labels, positions, broken = zip(*items, strict=True)
    return Batch(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels),
        list(positions),
        {index: why for found in broken for index, why in found.items()},
    )


def _stand_apart(worker: int) -> None:
    """Signals to the run's process group, as terminals and torchrun send them, are for the run to answer, which still
    needs a batch for its last step."""
    if hasattr(os, "setsid"):  # Windows has no such groups
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Batches(Iterator[Batch]):
    """The batches of one process, decoded ahead by worker processes unless they are in memory already."""

    def __init__(self, images: TrainingImages, sampler: PositionSampler, pin_memory: bool):
        workers = 0 if images._memory is not None else images.section.workers
        loader = DataLoader(
            images,
            batch_sampler=sampler,
            collate_fn=_collate,
            num_workers=workers,
            timeout=images.section.timeout if workers else 0,
            pin_memory=pin_memory,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_stand_apart,
            # workers draw nothing at random; a generator of its own keeps the loader off the global one
            generator=torch.Generator().manual_seed(0),
        )
        self.images, self._batches = images, iter(loader)
        self._broken = dict(images.broken)
        self._newly_broken: dict[int, str] = {}
        self.waited = 0.0
        """Seconds spent waiting for a batch so far."""

    def __next__(self) -> Batch:
        began = time.perf_counter()
        try:
            batch = next(self._batches)
        except UserError as error:  # of a worker, with its stack trace before it
            raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2]) from None
        except (ConnectionError, EOFError) as error:  # a worker is dying while it hands over a batch
            time.sleep(5)  # cut short by torch's own error, which would otherwise come in the middle of what follows
            raise RuntimeError("DataLoader worker (pid unknown) exited while it handed over a batch") from error
        self.waited += time.perf_counter() - began
        self._newly_broken |= batch.broken
        return batch

    def look(self, processes: Processes, console: Console) -> None:
        """Says which rows could not be read, in any process, since the last look; all processes take part.

        Raises:
            UserError: if they are too many by now.
        """
        newly = {row: why for found in processes.all_gather(self._newly_broken) for row, why in found.items()}
        self._newly_broken = {}
        _report_broken({row: why for row, why in newly.items() if row not in self._broken}, console)
        self._broken |= newly
        _check_broken(self._broken, self.images.source, self.images.section)
