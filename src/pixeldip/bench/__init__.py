"""Benchmarks: a table for people, one JSON line for programs."""

import json
from typing import Any

import torch
from rich.table import Table

from ..model import DiP, check_size
from ..processes import Processes, choose_device, choose_precision
from ..provenance import environment
from ..run_folder import check_writable
from ..sampling import load_pipeline
from ..terminal import PlainConsole
from ..training.pretrained import network_config
from .latency import bench_latency
from .plot import plot_images
from .training import bench_training


def bench_command(arguments: Any) -> None:
    """What `pixeldip bench` does with its `BenchArguments`.

    Raises:
        UserError: if there is no such model, or the size does not fit.
    """
    console = PlainConsole()
    device = choose_device(arguments.device)
    model, size = _model(arguments)
    check_size(*size, model.config.patch_size)
    if arguments.out:
        check_writable(arguments.out)
    torch.manual_seed(0)
    what = f"{model.num_parameters() / 1e6:.1f} M parameters, {arguments.batch} images of {size[0]}x{size[1]}"
    console.print(f"{arguments.what}: {arguments.model}, {what}, {device.type}", highlight=False)
    with console.status("taking turns"):
        common = (model, size, arguments.batch, arguments.rounds, arguments.compile, device)
        if arguments.what == "latency":
            result = bench_latency(*common, arguments.latent)
        else:
            result = bench_training(*common, choose_precision("auto", device))
    for line in _table(result):
        console.print(line)
    record = {
        "benchmark": arguments.what,
        "model": {"name": arguments.model, **network_config(model.config)},
        "height": size[0],
        "width": size[1],
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        **result,
        "environment": environment(Processes(0, 1, device)),
    }
    line = json.dumps(record)
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
        if "images" in result:
            plot_images(record, arguments.out.with_suffix(".png"))


def _model(arguments: Any) -> tuple[DiP, tuple[int, int]]:
    """The model, with weights moved off their start so that no gate is closed, and the size."""
    if "/" in arguments.model and arguments.model.split("/")[0].startswith(("dip-", "dit-")):
        model = DiP.from_preset(arguments.model)
        side = 16 * model.config.patch_size
        height, width = side, side
    else:
        pipeline = load_pipeline(arguments.model, torch.device("cpu"))
        model, height, width = pipeline.model, pipeline.config.height, pipeline.config.width
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.modulation.weight += 0.02 * torch.randn(block.modulation.weight.shape, generator=generator)
    return model, (arguments.height or height, arguments.width or width)


def _table(result: dict[str, Any]) -> list[Any]:
    table = Table("", "ms", "±", "GFLOP", "of the limit", *(["images/s"] if "images_per_second" in str(result) else []))
    for name, row in result["steps"].items():
        cells = [name, f"{row['milliseconds']:.1f}", f"{row['spread']:.1f}", f"{row['gflops']:.0f}"]
        cells.append(f"{row['share_of_limit']:.0%}")
        table.add_row(*cells, *([f"{row['images_per_second']:.2f}"] if "images_per_second" in row else []))
    whole = [
        f"a batch in {row['steps']} steps, {name}: {row['seconds']:.1f} s"
        for name, row in result.get("images", {}).items()
    ]
    ratios = [f"{name}: {value:.2f}x" for name, value in result["ratios"].items()]
    ceilings = [
        f"{name}: {values['gflops']:.0f} GFLOP/s in a large product" for name, values in result["ceilings"].items()
    ]
    return [table, *whole, *ratios, *ceilings]
