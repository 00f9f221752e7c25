"""Reading shuffled images from shards: `datasets` map-style, which pixeldip uses, and litdata where it is installed.

    python benchmarks/data_engines.py [--images 20000] [--side 256] [--out FILE]

Makes JPEG files of random pictures, packs them in each engine's way, and reads all bytes of an epoch in shuffled order,
undecoded, in one process. A table, and one JSON line. What a read costs is dominated by the disk where the images do
not fit in memory; here they do, so that it is the engine that is measured.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from record import put_out

from pixeldip.data import EpochOrder, open_source
from pixeldip.recipe import DataSection

SHARD = 2000


def jpegs(count: int, side: int) -> Iterator[bytes]:
    """Smooth random pictures of a photograph's size in bytes."""
    for seed in range(count):
        low = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        yield file.getvalue()


def pack(folder: Path, count: int, side: int) -> None:
    """Parquet shards, and litdata's chunks if it is installed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = list(jpegs(count, side))
    (folder / "parquet").mkdir()
    for start in range(0, count, SHARD):
        rows = [{"bytes": image, "path": None} for image in images[start : start + SHARD]]
        labels = [i % 10 for i in range(start, start + len(rows))]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        table = pa.table({"image": rows, "label": labels}, schema=features.arrow_schema)
        pq.write_table(table, folder / "parquet" / f"{start:08d}.parquet")
    try:
        from litdata.streaming.writer import BinaryWriter
    except ImportError:
        return
    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB")
    for index, image in enumerate(images):
        writer.add_item(index, {"image": image, "label": index % 10})
    writer.done()
    writer.merge()


def read(engine: str, folder: Path) -> dict[str, float]:
    """Seconds to open the shards for the first time and again, and images/s of an epoch."""
    opened = []
    for _ in range(2):
        began = time.perf_counter()
        if engine == "datasets":
            source = open_source(DataSection(source=str(folder / "parquet")))
        else:
            from litdata import StreamingDataset

            source = StreamingDataset(str(folder / "litdata"), shuffle=True, seed=0)
        opened.append(time.perf_counter() - began)
    began = time.perf_counter()
    total = 0
    if engine == "datasets":
        order = EpochOrder(len(source), 0)
        for position in range(len(source)):
            total += len(source.read(order[position][1])[0])
    else:
        for item in source:
            total += len(item["image"])
    seconds = time.perf_counter() - began
    return {
        "first_open_seconds": opened[0],
        "open_seconds": opened[1],
        "images_per_second": len(source) / seconds,
        "bytes_per_image": total / len(source),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)  # engine and folder: in a process of its own
    arguments = parser.parse_args()
    if arguments.read:
        engine, folder = arguments.read
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        print(json.dumps(read(engine, Path(folder))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        pack(Path(name), arguments.images, arguments.side)
        for engine in ("datasets", "litdata"):
            if engine == "datasets" or (Path(name) / engine).is_dir():
                command = [sys.executable, __file__, "--read", engine, name]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results[engine] = json.loads(done.stdout.splitlines()[-1])
    columns = list(next(iter(results.values())))
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for engine, row in results.items():
        print(f"| {engine} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |")
    asked = {"images": arguments.images, "side": arguments.side}
    record = {"benchmark": "data_engines", **asked, "engines": results}
    put_out(record, torch.device("cpu"), arguments.out)


if __name__ == "__main__":
    main()
