"""Where the time of a step goes: by kind of kernel, as torch's profiler sees them, a table and one JSON line.

    python benchmarks/profile_step.py {sampling,training} [--model dip-xl/16] [--batch 64] [--precision auto]
        [--device cuda] [--out FILE]

Compiled, as the commands run it with --compile; a step of sampling is a guided one with its modulation computed ahead,
and without graphs, into which the profiler does not see.
"""

import argparse
import functools
import re
from pathlib import Path
from typing import get_args

import torch
from record import put_out
from torch.profiler import ProfilerActivity, profile

from pixeldip.bench.commands import model_to_time
from pixeldip.bench.steps import TIME, TrainingStep, noise_and_labels, sampling_contender
from pixeldip.bench.timing import Ceilings, Step, seconds_of
from pixeldip.processes import choose_device, choose_precision, precision_name
from pixeldip.replay import ReplayedNetwork
from pixeldip.settings import Precision

KINDS = {  # the first pattern that a kernel's name matches
    "norms, modulation, rotations": r"^_norm_modulate|^_queries_and_keys",
    "attention": r"flash|fmha|attention|sdpa|cudnn::fusion",
    "convolutions": r"conv|wgrad|dgrad|fprop|implicit|nchw|nhwc|cudnn",
    "products": r"gemm|nvjet|cutlass|cublas|splitk|addmm|::mm|::bmm|int_mm|linear",
    "optimizer, average, norm of the gradient": r"multi_tensor|adam|foreach|lerp|norm_kernel",
    "compiled elementwise and sums": r"triton|cpp_fused|graph_\d|CompiledFxGraph",
    "copies and zeros": r"memcpy|memset|copy|fill|::cat",
    "other elementwise and sums": r"",
}
STEPS, MOST_NAMED = 3, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sampling", "training"))
    parser.add_argument("--model", default="dip-xl/16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="int8: of sampling alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN choose convolutions by their time")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.backends.cudnn.benchmark = asked.cudnn_benchmark
    device = choose_device(asked.device)
    weights = precision_of_weights(asked, device)
    step = step_asked_for(asked, device, weights)
    warm_up, *seconds = (seconds_of(step, STEPS, device) for _ in range(1 + STEPS))
    kernels = profiled(step, device)
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, kernel in kernels.items():
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        kinds[kind] += kernel["milliseconds"]
    largest = sorted(kernels, key=lambda name: -kernels[name]["milliseconds"])[:MOST_NAMED]
    record = {
        "benchmark": f"profile of {asked.what}",
        **{name: value for name, value in vars(asked).items() if name not in ("what", "out", "device")},
        "warm_up_seconds": STEPS * warm_up,
        "milliseconds": 1e3 * min(seconds),
        "images_per_second": asked.batch / min(seconds),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": {name: kernels[name] for name in largest},
        "weights": precision_name(weights),
        "ceiling_gflops": Ceilings.measure(device, weights).flops / 1e9,
    }
    if device.type == "cuda":
        record["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    print(f"{1e3 * min(seconds):.1f} ms a step of {asked.batch} images, {asked.batch / min(seconds):.1f} images/s")
    for kind, milliseconds in record["kinds"].items():
        print(f"{milliseconds:9.2f} ms  {kind}")
    put_out(record, device, asked.out)


def step_asked_for(asked: argparse.Namespace, device: torch.device, weights: torch.dtype) -> Step:
    torch.manual_seed(0)
    model, size = model_to_time(asked.model)
    model.to(device)
    x, y = noise_and_labels(model, size, asked.batch, device)
    if asked.what == "training":
        model.compile_repeated_blocks(dynamic=False)
        return functools.partial(TrainingStep(model, weights), x, y)
    model = model.eval().requires_grad_(False).type(weights)
    if asked.precision == "int8":
        model.quantize_to_int8()
    model.compile_repeated_blocks(dynamic=False)
    return sampling_contender(ReplayedNetwork(model, graphs=False).begin([TIME]), x, y).step


def precision_of_weights(asked: argparse.Namespace, device: torch.device) -> torch.dtype:
    return choose_precision("auto" if asked.precision == "int8" else asked.precision, device)


def profiled(step: Step, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds and calls in a step, by the name of a kernel, or on a CPU of an operation."""
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as profiler:
        seconds_of(step, STEPS, device)
    kernels = {}
    for event in profiler.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if own:
            kernels[event.key] = {"milliseconds": own / 1e3 / STEPS, "calls": event.count / STEPS}
    return kernels


if __name__ == "__main__":
    main()
