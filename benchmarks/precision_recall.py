"""Time and memory of precision and recall at the papers' size, on random features.

    python benchmarks/precision_recall.py [--samples 50000] [--references 10000]

Memory is the peak of the process less what it held with the features in place.
"""

import argparse
import json
import resource
import time

import torch

from pixeldip import __version__
from pixeldip.evaluation.metrics import precision_recall


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


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
        before, began = peak_mib(), time.perf_counter()
        precision, recall = precision_recall(samples, references, distance=distance)
        row = {
            "seconds": round(time.perf_counter() - began, 1),
            "mib_beyond_features": round(peak_mib() - before),
            "precision": precision,
            "recall": recall,
        }
        record["variants"][distance] = row
        print(f"{distance:<10} {row['seconds']:>8} {row['mib_beyond_features']:>24} {precision:>10.4f} {recall:>8.4f}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
