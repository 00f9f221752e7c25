"""How far images in less than float32 are from those in float32: a table of PSNR, and one JSON line.

    python benchmarks/precisions.py MODEL [--seeds 0-31] [--guidance 2] [--out FILE]

By solver and number of steps, over all pixels of all seeds, the median seed and the one that is farthest: bf16 weights,
float32 weights under autocast, on a CPU int8 with the rest in bf16 and in float32 (`--precision int8` takes what is
faster), all but autocast compiled, too, and float8 products as a GPU would make them, with scales by token and by
output, of rounded values, the rest in bf16.
"""

import copy
import math
import statistics

import torch
import torch.nn.functional as F
from solution import Samples, rms
from torch import Tensor, nn

from pixeldip.model import DiP, Int8Linear
from pixeldip.processes import autocast, computes_in_int8
from pixeldip.sampling import load_pipeline

SOLVERS = {"euler": 100, "ab2": 25, "ancestral": 25}
WEIGHTS = {
    "bf16": torch.bfloat16,
    "bf16, compiled": torch.bfloat16,
    "autocast": torch.float32,
    "int8 and bf16": torch.bfloat16,
    "int8 and bf16, compiled": torch.bfloat16,
    "int8 and fp32": torch.float32,
    "int8 and fp32, compiled": torch.float32,
    "float8": torch.bfloat16,
}
LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Float8Linear(nn.Module):
    """What a product of float8 values gives, computed in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = rounded(linear.weight.float()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rounded(x.float()), self.weight, bias).to(x.dtype)


def rounded(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def decibels(error: float) -> float:
    return 20 * math.log10(255 / error)


def main() -> None:
    samples = Samples()
    exact = {solver: samples.of(steps, solver) for solver, steps in SOLVERS.items()}
    found: dict[str, dict[str, dict[str, float | list[float]]]] = {}
    for name, weights in WEIGHTS.items():
        if name.startswith("int8") and not computes_in_int8(samples.device):
            continue
        samples.pipeline = load_pipeline(samples.asked.model, samples.device, weights)
        model = samples.pipeline.model
        if name == "float8":
            multiply_in_float8(model)
        elif name.startswith("int8"):
            model.quantize_to_int8()
        if name.endswith("compiled"):
            model.compile_repeated_blocks(dynamic=False)
        with autocast(samples.device, torch.bfloat16 if name == "autocast" else torch.float32):
            for solver, steps in SOLVERS.items():
                off = samples.of(steps, solver) - exact[solver]
                by_seed = [decibels(rms(one)) for one in off]
                shown = {"all": decibels(rms(off)), "median": statistics.median(by_seed), "farthest": min(by_seed)}
                found.setdefault(solver, {})[name] = {**shown, "by_seed": by_seed}
    print("| solver, steps | precision | all seeds, dB | median | farthest |\n|---|---|---|---|---|")
    for solver, steps in SOLVERS.items():
        for name, values in found[solver].items():
            figures = " | ".join(f"{values[which]:.1f}" for which in ("all", "median", "farthest"))
            print(f"| {solver}, {steps} | {name} | {figures} |")
    samples.put_out("precisions", psnr=found)


def multiply_in_float8(model: DiP) -> None:
    """Where int8 would."""
    plain = copy.deepcopy(model)
    model.quantize_to_int8()
    for name, module in list(model.named_modules()):
        if isinstance(module, Int8Linear):
            model.set_submodule(name, Float8Linear(plain.get_submodule(name)))


if __name__ == "__main__":
    main()
