"""A study's folder: what it says about itself, and files that are complete or not there."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from ..data import BrokenImage, decode
from ..errors import UserError
from ..files import check_writable, write_text
from ..processes import Processes, start_processes
from ..provenance import made_by
from ..recipe import flatten
from ..terminal import some

SETTINGS = "study.json"
RESULT = "result.json"  # of each run
COSTS = "costs.json"
SAMPLES = "samples.png"  # of each run
REPORT = "report.html"


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder and says in it which study it holds.

    Raises:
        UserError: if it holds another one, or cannot be written.
    """
    path = out / SETTINGS
    check_writable(path)
    if not path.is_file():
        write_result(path, settings)
        return
    theirs = flatten(read_json(path))
    for key, value in flatten(json.loads(json.dumps(settings))).items():
        if theirs.get(key) != value:
            raise UserError(
                f"{out} holds a study with another {key} ({theirs.get(key)}, now {value}): give the same arguments, or "
                "another folder with --out"
            )


def check_report(out: Path, there: set[str], asked: set[str]) -> None:
    """Raises UserError if the report of what is asked for would replace one that may be of more.

    Args:
        there, asked: names of what has its results in the folder, and of what the report will be of.
    """
    others = sorted(there - asked)
    if others and (out / REPORT).is_file():
        raise UserError(f"{out / REPORT} would lose {some(others)}: ask for these, too, or move the report away")


def alone_in(device: str, console: Console, work: Callable[[Processes], Any]) -> Any:
    """What `work` returns in the main process, in all of them, as a group of its own between those of trainings. The
    consoles of the others are quiet from then on."""
    with start_processes(device) as processes:
        console.quiet |= not processes.is_main
        return processes.on_main(lambda: work(processes))


def write_result(path: Path, values: Mapping[str, Any]) -> None:
    """In one step, with the program and the command that made it."""
    write_text(path, json.dumps({**made_by(), **values}, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError if it is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the same command makes it again") from error
    if not isinstance(values, dict) or not made_by().keys() <= values.keys():
        raise UserError(f"{path}: not a study's file; delete it, and the same command makes it again")
    return values


def read_picture(path: Path) -> Image.Image:
    """Raises UserError if it is damaged."""
    try:
        return decode(path.read_bytes())
    except BrokenImage as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the same command makes it again") from error
