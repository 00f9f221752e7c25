"""Time and memory of precision and recall at the papers' size, on random features.

    python benchmarks/precision_recall.py [--samples 50000] [--references 10000]

Memory is the peak of the process less what it held with the features in place (Linux).
"""

import argparse
import json
import time
from pathlib import Path

import torch

from pixeldip import __version__
from pixeldip.evaluation.metrics import precision_recall


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, on Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--references", type=int, default=10_000)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 2048, generator=generator) / 15
    samples, references = (
        (torch.randn(n, 64, generator=generator) @ mixing).relu() for n in (arguments.samples, arguments.references)
    )
    precision_recall(samples[:100], references[:100])
    record = {
        "benchmark": "precision_recall",
        "pixeldip": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "samples": len(samples),
        "references": len(references),
        "features_mib": round((samples.nbytes + references.nbytes) / 2**20),
        "variants": {},
    }
    print(f"{'distance':<10} {'seconds':>8} {'MiB beyond the features':>24} {'precision':>10} {'recall':>8}")
    for distance in ("adm", "float32"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        before, began = memory_mib("VmRSS"), time.perf_counter()
        precision, recall = precision_recall(samples, references, distance=distance)
        row = {
            "seconds": round(time.perf_counter() - began, 1),
            "mib_beyond_features": round(memory_mib("VmHWM") - before),
            "precision": precision,
            "recall": recall,
        }
        record["variants"][distance] = row
        print(f"{distance:<10} {row['seconds']:>8} {row['mib_beyond_features']:>24} {precision:>10.4f} {recall:>8.4f}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
