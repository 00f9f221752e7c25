"""What made an artefact: the command, the versions, the machine."""

import platform
import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch

from . import __version__
from .processes import Processes

_SECRET_FLAG = re.compile(r"(--?[\w.-]*(?:token|secret|password|api[_-]?key)[\w.-]*)(=.*)?", re.IGNORECASE | re.DOTALL)
_SECRET = re.compile(r"\bhf_\w{16,}|(?<=://)[^/\s@]+(?=@)")  # a hub token; user:password of an address


def environment(processes: Processes) -> dict[str, Any]:
    cuda = processes.device.type == "cuda"
    return {
        "command": command(),
        "pixeldip": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "diffusers": diffusers.__version__,
        "datasets": version("datasets"),  # to import it takes half a second
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(processes.device) if cuda else processes.device.type,
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
    }


def restart(processes: Processes) -> dict[str, Any]:
    """What may differ between two starts of one run: code, machine, command."""
    values = environment(processes)
    kept = ("command", "pixeldip", "python", "torch", "device", "processes")
    return {**{name: values[name] for name in kept}, "commit": commit(), "host": socket.gethostname()}


def commit() -> str | None:
    """The git commit of this package's code, "-dirty" if it was changed since; None outside of its checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an environment inside somebody else's checkout is not ours
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def made_by() -> dict[str, str]:
    """The program and the command, for files that record their own settings."""
    return {"pixeldip": __version__, "command": command()}


def command() -> str:
    """What was typed, fit to be shared with what it made: without secrets."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m, and of what torchrun starts
    words = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    hidden = False
    for word in sys.argv[1:]:
        flag = _SECRET_FLAG.fullmatch(word)
        if flag:
            word = f"{flag[1]}=***" if flag[2] else word
        elif hidden:
            word = "***"
        hidden = bool(flag) and not flag[2]
        words.append(_SECRET.sub("***", word))
    return shlex.join(words)
