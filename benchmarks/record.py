"""What scripts here put out at their end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pixeldip.processes import Processes
from pixeldip.provenance import environment


def put_out(record: Mapping[str, Any], device: torch.device, out: Path | None) -> None:
    """Prints a record as one JSON line, with the machine and the versions it was measured with, and writes it to a
    file, if there is to be one."""
    line = json.dumps({**record, "environment": environment(Processes(0, 1, device))})
    print(line)
    if out:
        out.write_text(line + "\n", encoding="utf-8")
