"""From flags to a benchmark: a table for people, one JSON line for programs, a plot for both."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ..arguments import BenchArguments
from ..errors import UserError
from ..files import check_writable
from ..model import DiP, check_size, network_config
from ..processes import Processes, choose_device, choose_precision, precision_name
from ..provenance import environment
from ..sampling import load_pipeline
from ..settings import refuse_flags
from ..terminal import PlainConsole, StartPass, progress, say
from .latency import bench_latency
from .memory import bench_memory
from .plot import plot
from .release import has_releases_form
from .scaling import bench_scaling
from .throughput import bench_throughput
from .training import bench_training

MOST_COMPILED = 64  # shapes of a function

FOREIGN = {
    "latency": ("batches", "processes"),
    "training": ("batches", "processes", "latent"),
    "throughput": ("batch", "processes", "heads", "latent"),
    "memory": ("batch", "processes", "rounds", "compile", "latent"),
    "scaling": ("batches", "compile", "heads", "latent"),
}
"""Flags that mean nothing to a benchmark."""

COLUMNS = {
    "parameters": ("M weights", lambda value: f"{value / 1e6:.1f}"),
    "milliseconds": ("ms", "{:.1f}".format),
    "spread": ("±", "{:.1f}".format),
    "gflops": ("GFLOP", lambda value: f"{value:.0f}" if value >= 10 else f"{value:.2g}"),
    "share_of_limit": ("of limit", "{:.0%}".format),
    "images_per_second": ("images/s", "{:.3g}".format),
    "efficiency": ("efficiency", "{:.0%}".format),
    "mebibytes": ("MiB", "{:.0f}".format),
}


def bench_command(arguments: BenchArguments) -> None:
    """What `pixeldip bench` does.

    Raises:
        UserError: if there is no such model, the size does not fit, or a flag means nothing to the benchmark.
    """
    refuse_flags(arguments, FOREIGN[arguments.what], f"means nothing to bench {arguments.what}; leave it out")
    if arguments.out and arguments.out.suffix.lower() == ".png":
        raise UserError(f"--out {arguments.out}: is for the JSON line, a plot goes beside it; name it .json")
    console = PlainConsole()
    device = choose_device(arguments.device)
    torch.manual_seed(0)
    model, size = model_to_time(arguments.model, arguments.height, arguments.width)
    check_size(*size, model.config.patch_size)
    if arguments.out:
        check_writable(arguments.out)
    precision = choose_precision(arguments.precision, device)
    what = f"{model.num_parameters() / 1e6:.1f} M parameters, images of {size[0]}x{size[1]}"
    say(console, f"{arguments.what}: {arguments.model}, {what}, {device.type}, {precision_name(precision)}")
    if arguments.what in ("latency", "training") and not has_releases_form(model):
        say(console, "the release has no such model: its way of working is left out")
    with progress(console, "turns") as start, as_compiled_as_told() if arguments.compile else contextlib.nullcontext():
        result, asked = _measure(arguments, model, size, device, precision, start)
    for line in _table(result):
        console.print(line)
    record = {
        "benchmark": arguments.what,
        "model": {"name": arguments.model, **network_config(model.config)},
        "height": size[0],
        "width": size[1],
        "precision": precision_name(precision),
        **asked,
        **result,
        "environment": environment(Processes(0, 1, device)),
    }
    line = json.dumps(record)
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
        plot(record, arguments.out.with_suffix(".png"))


@contextlib.contextmanager
def as_compiled_as_told() -> Iterator[None]:
    """In here what is to be compiled is, for as many shapes as take turns. By itself torch stops compiling a function
    after eight, and goes on with the plain code, whose times would stand in the rows of the compiled."""
    import torch._dynamo  # takes seconds

    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED, fail_on_recompile_limit_hit=True):
        yield


def _measure(
    arguments: BenchArguments,
    model: DiP,
    size: tuple[int, int],
    device: torch.device,
    precision: torch.dtype,
    start: StartPass,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The benchmark's result, and those of the arguments that it went by."""
    what, batch, rounds, compiled = arguments.what, arguments.batch, arguments.rounds, arguments.compile
    batches, processes = sorted(set(arguments.batches)), sorted({1, *arguments.processes})
    if what == "latency":
        others = arguments.heads, arguments.latent
        result = bench_latency(model, size, batch, rounds, compiled, device, precision, *others, start)
        return result, {"batch": batch, "rounds": rounds}
    if what == "training":
        result = bench_training(model, size, batch, rounds, compiled, device, precision, arguments.heads, start)
        return result, {"batch": batch, "rounds": rounds}
    if what == "throughput":
        result = bench_throughput(model, size, batches, rounds, compiled, device, precision, start)
        return result, {"batches": batches, "rounds": rounds, "compiled": compiled}
    if what == "memory":
        return bench_memory(model, size, batches, device, precision, arguments.heads, start), {"batches": batches}
    result = bench_scaling(model, size, batch, processes, rounds, device, precision, start)
    return result, {"batch": batch, "processes": processes, "rounds": rounds}


def model_to_time(name: str, height: int | None = None, width: int | None = None) -> tuple[DiP, tuple[int, int]]:
    """A preset's or a checkpoint's model, with weights moved off their start so that no gate is closed, and the size
    (height, width) of its images unless one is given."""
    named_like_one = "/" in name and name.split("/")[0].startswith(("dip-", "dit-"))
    if named_like_one and not Path(name).expanduser().is_dir():
        model = DiP.from_preset(name)
        own = 2 * (16 * model.config.patch_size,)
    else:
        pipeline = load_pipeline(name, torch.device("cpu"))
        model, own = pipeline.model, (pipeline.config.height, pipeline.config.width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.modulation.weight += 0.02 * torch.randn(block.modulation.weight.shape, generator=generator)
    return model, (height or own[0], width or own[1])


def _table(result: Mapping[str, Any]) -> list[Any]:
    rows = result["steps"]
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")  # which wraps where the terminal is narrow, and figures do not
    for column in columns:
        table.add_column(COLUMNS[column][0], justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(COLUMNS[column][1](row[column]) for column in columns))
    lines: list[Any] = [table]
    for name, row in result.get("images", {}).items():
        lines.append(f"a batch in {row['steps']} steps, {name}: {row['seconds']:.1f} s")
    for name in result.get("too_large", ()):
        lines.append(f"{name}: does not fit in the device's memory")
    for name, mebibytes in result.get("per_image", {}).items():
        lines.append(f"{name}: {mebibytes:.1f} MiB for each image more")
    for name, value in result.get("ratios", {}).items():
        lines.append(f"{name}: {value:.2f}x")
    for name, values in result.get("ceilings", {}).items():
        lines.append(f"{name}: {values['gflops']:.0f} GFLOP/s in a large product")
    return lines
