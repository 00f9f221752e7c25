"""How far images in bf16 and int8 are from those in float32: a table of PSNR, and one JSON line.

    python benchmarks/precisions.py MODEL [--seeds 0-31] [--guidance 2] [--out FILE]

The median over seeds, and the seed that is farthest, by solver and number of steps; bf16 weights, float32 weights under
autocast, and int8 as `--precision int8` computes it.
"""

import math
import statistics

import torch
from solution import Samples, rms

from pixeldip.processes import autocast, choose_precision
from pixeldip.sampling import load_pipeline

SOLVERS = {"euler": 100, "ab2": 25, "ancestral": 25}
PRECISIONS = {"bf16": "bf16", "autocast": "fp32", "int8": "int8"}


def main() -> None:
    samples = Samples()
    exact = {solver: samples.of(steps, solver) for solver, steps in SOLVERS.items()}
    errors: dict[str, dict[str, dict[str, float]]] = {}
    print("| solver, steps | " + " | ".join(f"{name}, dB | farthest" for name in PRECISIONS) + " |")
    print("|---|" + "---|" * 2 * len(PRECISIONS))
    for name, precision in PRECISIONS.items():
        samples.pipeline = load_pipeline(
            samples.asked.model, samples.device, choose_precision(precision, samples.device)
        )
        with autocast(samples.device, torch.bfloat16 if name == "autocast" else torch.float32):
            for solver, steps in SOLVERS.items():
                off = samples.of(steps, solver) - exact[solver]
                by_seed = list(map(rms, off))
                errors.setdefault(solver, {})[name] = {"median": statistics.median(by_seed), "farthest": max(by_seed)}
    for solver, steps in SOLVERS.items():
        values = (20 * math.log10(255 / error) for by in errors[solver].values() for error in by.values())
        print(f"| {solver}, {steps} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    samples.put_out("precisions", errors)


if __name__ == "__main__":
    main()
