"""How fast workers read and decode a run's images, with nothing else to do: a table, and one JSON line.

    python benchmarks/decoding.py [--sides 256 433] [--resolution 256] [--workers 0 1 2] [--batches 100] [--out FILE]

JPEG files of random pictures, of so many pixels a side (433 squared are ImageNet's 500 x 375), become batches of 32 as
`pixeldip train` takes them. Images per second once every worker is there; 0 decodes in the command's own process. A run
whose steps take images faster than that waits for them, and says so as `waiting_for_images`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from data_engines import jpegs
from record import put_out

from pixeldip.data import Batches, PositionSampler, TrainingImages, open_source
from pixeldip.recipe import DataSection

FILES, BATCH, FIRST = 512, 32, 4  # batches until every worker is there


def images_per_second(section: DataSection, count: int) -> float:
    images = TrainingImages(open_source(section), section, seed=0)
    sampler = PositionSampler(BATCH, 0, FIRST + count, 1, 0, 1)
    batches = Batches(images, sampler, pin_memory=False)
    for _ in range(FIRST):
        next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return count * BATCH / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 433])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=100, help="of 32 images, timed")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found: dict[int, dict[int, float]] = {}
    print(
        "| side | KB | "
        + " | ".join(f"{n} workers" for n in asked.workers)
        + " |\n"
        + "|---" * (2 + len(asked.workers))
        + "|"
    )
    for side in asked.sides:
        with tempfile.TemporaryDirectory() as folder:
            for i, jpeg in enumerate(jpegs(FILES, side)):
                Path(folder, f"{i}.jpg").write_bytes(jpeg)
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / FILES / 1000
            found[side] = {}
            for workers in asked.workers:
                section = DataSection(source=folder, resolution=asked.resolution, workers=workers, in_memory=False)
                found[side][workers] = images_per_second(section, asked.batches)
        print(f"| {side} | {size:.0f} | " + " | ".join(f"{rate:.0f}" for rate in found[side].values()) + " |")
    arguments = {name: value for name, value in vars(asked).items() if name not in ("out", "workers")}
    put_out({"benchmark": "decoding", **arguments, "images_per_second": found}, torch.device("cpu"), asked.out)


if __name__ == "__main__":
    main()
