"""FSDP2: weights, gradients, optimizer state and average in equal parts over the processes.

The model is gathered block by block where it computes, and whole only to be sampled or exported.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..model import DiP, network_config
from ..processes import Processes


def shard(network: nn.Module, processes: Processes, precision: torch.dtype) -> None:
    """Leaves each process its part of every parameter, on its device. Give it the whole network on the CPU.

    Each DiT block is gathered by itself; embeddings and heads together, with the first of them.

    Args:
        precision: weights are gathered in it; autocast would keep such copies of all of them until the backward pass.
            The parts stay float32, and gradients are summed in it.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    network.to(memory_format=torch.contiguous_format)  # the only one that can be cut
    dip = network if isinstance(network, DiP) else network.model
    for block in dip.backbone.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor, in every process; all take part if it is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_model(model: DiP) -> DiP:
    """The model as one that can be sampled and saved: itself, or gathered, in every process and by all of them."""
    if not is_sharded(model):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    config: dict[str, Any] = network_config(model.config)
    with torch.device("meta"):
        gathered = DiP(**config)
    gathered.load_state_dict(weights, strict=True, assign=True)
    return gathered.eval().requires_grad_(False).to(memory_format=torch.channels_last)
