"""What takes turns in a benchmark, and the row of figures each makes."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..processes import precision_name
from ..terminal import StartPass
from .timing import Ceilings, Step, Times, count_flops, ratio, take_turns, turns


class Int8Part(NamedTuple):
    """FLOPs and weights of a step's products of 8-bit integers."""

    flops: int = 0
    weights: int = 0


NO_INT8 = Int8Part()


@dataclass
class Contender:
    """A step to time.

    Args:
        batch: images in a step.
        images: how many images a step finishes; a sampling step finishes a part of them.
        precision: of the products, and of the weights as a sampling step reads them.
        counted: makes the same step as plain eager code, of so many images, where the FLOPs of the step itself cannot
            be counted.
        int8: the part of the step, and of the parameters, that is in int8.
    """

    step: Step
    batch: int
    images: float
    precision: torch.dtype
    parameters: int
    counted: Callable[[int], Step] | None = None
    int8: Int8Part = NO_INT8

    @property
    def precisions(self) -> tuple[torch.dtype, ...]:
        return (self.precision, torch.int8) if self.int8.flops else (self.precision,)

    def flops(self) -> int:
        """Of a step. Where one and two images are counted, it is what every further image takes that counts."""
        if self.counted is None:
            return count_flops(self.step)
        one = _count_again(self.counted(1))
        return one if self.batch == 1 else one + (self.batch - 1) * (_count_again(self.counted(2)) - one)

    def floor(self, flops: int, ceilings: Mapping[torch.dtype, Ceilings]) -> float:
        """Seconds that a step of so many FLOPs takes at the ceilings, or reading its weights once, whichever is
        longer."""
        products = {self.precision: flops - self.int8.flops}
        weights = {self.precision: self.parameters - self.int8.weights}
        if self.int8.flops:
            products[torch.int8], weights[torch.int8] = self.int8
        computing = sum(count / ceilings[precision].flops for precision, count in products.items())
        weight_bytes = sum(count * precision.itemsize for precision, count in weights.items())
        return max(computing, weight_bytes / ceilings[self.precision].bandwidth)


def _count_again(step: Step) -> int:
    """FLOPs without what a first call computes once and for all."""
    step()
    return count_flops(step)


@dataclass(frozen=True)
class Timings:
    """rows: figures by contender's name; seconds: of each in each round; ceilings: by precision's name; too_large: who
    did not fit in the device's memory."""

    rows: dict[str, dict[str, float]]
    seconds: dict[str, list[float]]
    ceilings: dict[str, dict[str, float]]
    too_large: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The part that all benchmarks' JSON lines have."""
        return {"steps": self.rows, "ceilings": self.ceilings, "too_large": list(self.too_large)}

    def ratios(self, like: Mapping[str, str] | None = None) -> dict[str, float]:
        """Of every other row to the fastest of ours, or to the one that `like` names for it, within rounds."""
        ours = [name for name in self.rows if name.startswith("ours")]
        fastest = min(ours or self.rows, key=lambda name: self.rows[name]["milliseconds"])
        pairs = {name: (like or {}).get(name, fastest) for name in self.rows if name != fastest}
        return {f"{name} / {other}": ratio(self.seconds, name, other) for name, other in pairs.items()}


def compare(contenders: Mapping[str, Contender], rounds: int, device: torch.device, start: StartPass) -> Timings:
    """Times contenders in turn, and shows how far it is.

    A row has parameters, milliseconds and their spread, images per second, GFLOP, the floor in milliseconds that the
    device's ceilings put under it, and the share of that limit reached.
    """
    advance = start("Timing", turns(contenders, rounds))
    steps = {name: contender.step for name, contender in contenders.items()}
    seconds = take_turns(steps, rounds, device, advance=advance)
    precisions = dict.fromkeys(precision for contender in contenders.values() for precision in contender.precisions)
    ceilings = {precision: Ceilings.measure(device, precision) for precision in precisions}
    rows = {}
    for name, contender in contenders.items():
        times, flops = Times.of(seconds[name]), contender.flops()
        floor = contender.floor(flops, ceilings)
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
    return Timings(rows, seconds, limits)


def compare_alone(
    makers: Mapping[str, Callable[[], Contender]], rounds: int, device: torch.device, start: StartPass
) -> Timings:
    """As `compare`, one after another, each alone in the device's memory: for a GPU, whose pace hardly drifts, and
    contenders that fill it. One that does not fit is left out.

    Raises:
        UserError: if none fits.
    """
    whole, too_large = Timings({}, {}, {}), []
    for name, make in makers.items():
        try:
            part = compare({name: make()}, rounds, device, start)
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
