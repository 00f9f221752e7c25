"""What takes turns in a benchmark, and the row of figures each makes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..processes import precision_name
from .timing import Ceilings, Step, Times, count_flops, ratio, take_turns


@dataclass
class Contender:
    """A step to time.

    Args:
        images: how many images a step finishes; a sampling step finishes a part of them.
        precision: of the products, and of the weights as a sampling step reads them.
        counted: the same step as plain eager code, for those whose FLOPs cannot be counted.
    """

    step: Step
    images: float
    precision: torch.dtype
    parameters: int
    counted: Step | None = None


@dataclass(frozen=True)
class Comparison:
    """rows: figures by contender's name; seconds: of each in each round; ceilings: by precision's name."""

    rows: dict[str, dict[str, float]]
    seconds: dict[str, list[float]]
    ceilings: dict[str, dict[str, float]]

    def record(self) -> dict[str, Any]:
        """The part that all benchmarks' JSON lines have."""
        return {"steps": self.rows, "ceilings": self.ceilings}

    def ratios(self) -> dict[str, float]:
        """Of every other row to the fastest of ours, within rounds."""
        ours = [name for name in self.rows if name.startswith("ours")]
        fastest = min(ours, key=lambda name: self.rows[name]["milliseconds"])
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
        if contender.counted:
            contender.counted()  # what a first call computes once and for all is not counted
        times, flops = Times.of(seconds[name]), count_flops(contender.counted or contender.step)
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
