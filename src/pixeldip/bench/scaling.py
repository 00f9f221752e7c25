"""Training steps on a growing number of processes of this machine."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..heap import keep_freed_memory
from ..model import DiP, network_config
from ..processes import start_processes
from ..terminal import StartPass
from .steps import TrainingStep, noise_and_labels
from .timing import Times, take_turns


def bench_scaling(
    model: DiP,
    size: tuple[int, int],
    batch: int,
    processes: Sequence[int],
    rounds: int,
    device: torch.device,
    precision: torch.dtype,
    start: StartPass,
) -> dict[str, Any]:
    """DistributedDataParallel with `batch` images in each process, for each number of processes, of which one is 1.

    On a CPU the processes of every row have the same number of threads: as many as the largest row can give to each.

    Returns:
        "steps": milliseconds, images/s and efficiency, the rate over that of as many times one process, by number of
        processes; "series": [processes, images/s] pairs.

    Raises:
        UserError: if there are not as many GPUs, or a process fails.
    """
    if device.type == "cuda" and max(processes) > torch.cuda.device_count():
        raise UserError(f"--processes {max(processes)}: torch sees {torch.cuda.device_count()} GPUs here")
    threads = max(1, (os.cpu_count() or 1) // max(processes))
    arguments = (network_config(model.config), size, batch, rounds, device.type, precision, threads)
    rows: dict[str, dict[str, float]] = {}
    advance = start("Measuring", len(processes))
    for count in processes:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="bench",
            start_method="spawn",
            max_restarts=0,
        )
        try:
            times = Times.of(elastic_launch(launch, _train)(*arguments)[0])
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            raise UserError(f"bench scaling: with {count} processes: {failure.get_error_message()}") from error
        rows[str(count)] = {
            "milliseconds": 1e3 * times.median,
            "spread": 1e3 * times.spread,
            "images_per_second": count * batch / times.median,
        }
        advance(1)
    for name, row in rows.items():
        row["efficiency"] = row["images_per_second"] / rows["1"]["images_per_second"] / int(name)
    series = {"training": [[count, rows[str(count)]["images_per_second"]] for count in processes]}
    return {"steps": rows, "threads": threads, "series": series}


def _train(
    config: Mapping[str, Any],
    size: tuple[int, int],
    batch: int,
    rounds: int,
    device: str,
    precision: torch.dtype,
    threads: int,
) -> list[float]:
    """Seconds of each step in this process."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    with start_processes(device) as processes:
        model = DiP(**config).to(processes.device)
        parallel = DistributedDataParallel(model) if processes.world_size > 1 else model
        step = TrainingStep(model, precision, parallel)
        x, y = noise_and_labels(model, size, batch, processes.device)
        return take_turns({"step": lambda: step(x, y)}, rounds, processes.device, processes)["step"]
