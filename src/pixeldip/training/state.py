"""What a run resumes from beside its averaged weights: weights, optimizer state and step, as tensors by name.

They lie in a folder of safetensors files, one of the whole or one of each process's part, and can be read from either
by any number of processes, sharded or not.
"""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .sharding import is_sharded

_STEP = "step"


def training_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, step: int, average: nn.Module | None = None
) -> dict[str, Tensor]:
    """The tensors by name, parts of them where the network is sharded; they are those in use, not copies.

    Args:
        average: also this averaged network, if a pipeline does not hold it as it is.
    """
    tensors = {f"network.{name}": value for name, value in get_model_state_dict(network).items()}
    for parameter, values in get_optimizer_state_dict(network, optimizer)["state"].items():
        tensors |= {f"optimizer.{parameter}.{name}": value for name, value in values.items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    return {**tensors, _STEP: torch.tensor(step)}


def write_state(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Writes the state of a network that is not sharded."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "state.safetensors")


def read_state(
    folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> int:
    """Restores everything, strictly, and returns the step.

    Raises:
        ValueError: if it is the state of another network.
        Exception: of many kinds, if the files are damaged.
    """
    tensors = training_state(network, optimizer, 0, average)
    reader = HuggingFaceStorageReader(str(folder))
    there = reader.read_metadata().state_dict_metadata.keys()
    if other := sorted(there ^ tensors.keys()):
        raise ValueError(f"it is of another network: {other[0]} is only {'there' if other[0] in there else 'here'}")
    try:
        with warnings.catch_warnings(action="ignore"):  # that one process reads alone
            dcp.load(tensors, storage_reader=reader, no_dist=not is_sharded(network))
    except CheckpointException as error:  # no Exception, so that nobody catches it by chance
        raise first_failure(error) from error
    set_model_state_dict(network, _part(tensors, "network."))
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in _part(tensors, "optimizer.").items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(parameter, {})[key] = value
    groups = get_optimizer_state_dict(network, optimizer)["param_groups"]
    set_optimizer_state_dict(network, optimizer, {"state": state, "param_groups": groups})
    if average is not None:
        average.load_state_dict(_part(tensors, "average."), strict=True)
    return int(tensors[_STEP])


def first_failure(error: CheckpointException) -> BaseException:
    """What happened in the first of the processes that failed."""
    return error.failures[min(error.failures)][0]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
