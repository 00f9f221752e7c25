"""What made an artefact: the command, the versions, the machine."""

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy
import torch

from . import __version__
from .processes import Processes


def environment(processes: Processes) -> dict[str, Any]:
    cuda = processes.device.type == "cuda"
    return {
        "command": command(),
        "pixeldip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "diffusers": diffusers.__version__,
        "datasets": datasets.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(processes.device) if cuda else processes.device.type,
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
    }


def made_by() -> dict[str, str]:
    """The program and the command, for files that record their own settings."""
    return {"pixeldip": __version__, "command": command()}


def command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
