"""What takes turns in a benchmark, and the row of figures each makes."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..processes import precision_name
from .timing import Ceilings, Step, Times, count_flops, ratio, take_turns


@dataclass
class Contender:
    """A step to time.

    Args:
        batch: images in a step.
        images: how many images a step finishes; a sampling step finishes a part of them.
        precision: of the products, and of the weights as a sampling step reads them.
        counted: makes the same step as plain eager code, of so many images, where the FLOPs of the step itself cannot
            be counted.
    """

    step: Step
    batch: int
    images: float
    precision: torch.dtype
    parameters: int
    counted: Callable[[int], Step] | None = None

    def flops(self) -> int:
        """Of a step. Where one and two images are counted, it is what every further image takes that counts."""
        if self.counted is None:
            return count_flops(self.step)
        one = _count_again(self.counted(1))
        return one if self.batch == 1 else one + (self.batch - 1) * (_count_again(self.counted(2)) - one)


def _count_again(step: Step) -> int:
    """FLOPs without what a first call computes once and for all."""
    step()
    return count_flops(step)


@dataclass(frozen=True)
class Comparison:
    """rows: figures by contender's name; seconds: of each in each round; ceilings: by precision's name; too_large: who
    did not fit in the device's memory."""

    rows: dict[str, dict[str, float]]
    seconds: dict[str, list[float]]
    ceilings: dict[str, dict[str, float]]
    too_large: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The part that all benchmarks' JSON lines have."""
        return {"steps": self.rows, "ceilings": self.ceilings, "too_large": list(self.too_large)}

    def ratios(self) -> dict[str, float]:
        """Of every other row to the fastest of ours, within rounds."""
        ours = [name for name in self.rows if name.startswith("ours")]
        fastest = min(ours or self.rows, key=lambda name: self.rows[name]["milliseconds"])
        return {f"{name} / {fastest}": ratio(self.seconds, name, fastest) for name in self.rows if name != fastest}


def compare(contenders: Mapping[str, Contender], rounds: int, device: torch.device) -> Comparison:
    """Times contenders in turn.

    A row has parameters, milliseconds and their spread, images per second, GFLOP, the floor in milliseconds that the
    device's ceilings put under it, and the share of that limit reached.
    """
    seconds = take_turns({name: contender.step for name, contender in contenders.items()}, rounds, device)
    precisions = dict.fromkeys(contender.precision for contender in contenders.values())
    ceilings = {precision: Ceilings.measure(device, precision) for precision in precisions}
    rows = {}
    for name, contender in contenders.items():
        times, flops = Times.of(seconds[name]), contender.flops()
        weight_bytes = contender.parameters * contender.precision.itemsize
        floor = ceilings[contender.precision].floor(flops, weight_bytes)
        rows[name] = {
            "parameters": contender.parameters,
            "milliseconds": 1e3 * times.median,
            "spread": 1e3 * times.spread,
            "images_per_second": contender.images / times.median,
            "gflops": flops / 1e9,
            "floor_milliseconds": 1e3 * floor,
            "share_of_limit": floor / times.median,
        }
    limits = {
        precision_name(precision): {"gflops": c.flops / 1e9, "gigabytes_per_second": c.bandwidth / 1e9}
        for precision, c in ceilings.items()
    }
    return Comparison(rows, seconds, limits)


def compare_alone(makers: Mapping[str, Callable[[], Contender]], rounds: int, device: torch.device) -> Comparison:
    """As `compare`, one after another, each alone in the device's memory: for a GPU, whose pace hardly drifts, and
    contenders that fill it. One that does not fit is left out.

    Raises:
        UserError: if none fits.
    """
    whole, too_large = Comparison({}, {}, {}), []
    for name, make in makers.items():
        try:
            part = compare({name: make()}, rounds, device)
        except torch.OutOfMemoryError:
            too_large.append(name)
        else:
            whole.rows.update(part.rows)
            whole.seconds.update(part.seconds)
            whole.ceilings.update(part.ceilings)
        gc.collect()
        torch.cuda.empty_cache()
    if not whole.rows:
        raise UserError(f"{', '.join(too_large)}: the device's memory does not hold a step; give a smaller --batch")
    return dataclasses.replace(whole, too_large=tuple(too_large))
