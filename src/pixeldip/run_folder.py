"""What a run folder holds, and where.

recipe.yaml               the resolved recipe
environment.json          versions, device and command of the first start
data.json                 number, classes and fingerprint of the training images
start.json                what was kept of a pretrained model, if there was one
metrics.jsonl             a line per logged step, and one per event: start, evaluation, divergence, interrupted, failed
checkpoints/step-…/       state/ (weights, optimizer, step), pipeline/ (EMA weights, as diffusers loads them),
                          of a run that trains adapters lora/, and checksums.json
checkpoints/damaged-…/    a checkpoint whose files differed from their checksums when the run was resumed
previews/step-….png       sample grids of fixed seeds
.lock                     held by the process that is training here
"""

import contextlib
import difflib
import json
import os
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"
START = "start.json"
DATA = "data.json"
LOG = "metrics.jsonl"
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
PREVIEWS = "previews"
PIPELINE = "pipeline"
NETWORK = "model"  # the network's folder in a pipeline's
TRAINING_STATE = "state"
CHECKSUMS = "checksums.json"
LORA = "lora"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint or preview."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. (One being written has another name until it is.)"""
    return _numbered(path for path in (run / CHECKPOINTS).glob("step-*") if path.is_dir())


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def newest_lora(run: Path) -> Path | None:
    """The adapters of a run's newest checkpoint, or None."""
    checkpoint = newest_checkpoint(run)
    return checkpoint / LORA if checkpoint and (checkpoint / LORA).is_dir() else None


def belongs_to_a_run(folder: Path) -> bool:
    """Whether it is a run's folder or its checkpoint's pipeline, where another saved model would take their place."""
    return newest_checkpoint(folder) is not None or (folder.parent / CHECKSUMS).is_file()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run in order; steps that a resume went back behind count as it ran them again."""
    return _by_step(run, lambda entry: _are_numbers(entry.get("loss"), entry.get("images_per_second")))


def training_rate(run: Path) -> float:
    """Images per second: the median over the logged steps, so that a busy minute does not count; 0 before the first."""
    rates = [entry["images_per_second"] for entry in read_metrics(run)]
    return statistics.median(rates) if rates else 0.0


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run in order, each with its step, metrics and floors."""
    return _by_step(run, lambda entry: entry.get("event") == "evaluation" and _is_evaluation(entry))


def read_events(run: Path, name: str) -> list[dict[str, Any]]:
    """The events of a kind as they happened, for instance each "start" of the run."""
    return [entry for entry in _lines(run) if entry.get("event") == name]


def preview_files(run: Path) -> list[Path]:
    """The sample grids of a run, oldest first."""
    return _numbered((run / PREVIEWS).glob("step-*.png"))


def newest_preview(run: Path) -> Path | None:
    """The newest sample grid of a run that is not newer than its newest checkpoint, or None."""
    checkpoint = newest_checkpoint(run)
    saved = [path for path in preview_files(run) if checkpoint and step_of(path) <= step_of(checkpoint)]
    return saved[-1] if saved else None


def _by_step(run: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    by_step: dict[int, dict[str, Any]] = {}
    for entry in _lines(run):
        reached = entry.get("step")
        if not isinstance(reached, int):
            continue
        if entry.get("event") == "start":
            by_step = {step: old for step, old in by_step.items() if step <= reached}
        elif wanted(entry):
            by_step[reached] = entry
    return [by_step[step] for step in sorted(by_step)]


def _lines(run: Path) -> Iterator[dict[str, Any]]:
    """The entries of metrics.jsonl; lines that are none are passed over."""
    path = run / LOG
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # the line that was being written when the run was killed
            continue
        if isinstance(entry, dict):
            yield entry


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _is_evaluation(entry: dict[str, Any]) -> bool:
    metrics, floors = entry.get("metrics"), entry.get("floors")
    return isinstance(metrics, dict) and isinstance(floors, dict) and _are_numbers(*metrics.values())


def _numbered(paths: Iterable[Path]) -> list[Path]:
    """Those that are named after a step, in order: not a copy that someone laid beside them."""
    named = (path for path in paths if re.fullmatch(r"step-[0-9]{8,18}(\.png)?", path.name))
    return sorted(named, key=step_of)


def names_a_model(name: str) -> bool:
    """Whether `resolve_model` would look for a model there: a folder that holds one, or a hub id."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return (path / "model_index.json").is_file() or newest_checkpoint(path) is not None
    return not path.exists() and path.suffix != ".npz" and may_be_hub_id(name)


def may_be_hub_id(name: str) -> bool:
    """Whether it is spelled as one, owner/name, and not as a folder."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def resolve_model(name: str) -> str:
    """The folder or hub id of a pipeline, given a run folder, a saved model folder or a hub id.

    Raises:
        UserError: if it is a folder without a model, a run whose newest checkpoint lacks it, or no folder nor hub id.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return str(path)
        if checkpoint := newest_checkpoint(path):
            if (checkpoint / PIPELINE).is_dir():
                return str(checkpoint / PIPELINE)
            raise UserError(
                f"{checkpoint}: without its {PIPELINE}/ folder, which holds the model; put that back, or move the "
                "checkpoint away to use the one before it, if there is one"
            )
        raise UserError(f"{name}: neither a saved model (no model_index.json) nor a run with a checkpoint")
    if path.exists():
        raise UserError(
            f"{name}: a file; to load an authors' checkpoint, first run pixeldip convert {shlex.quote(name)} OUT"
        )
    if not may_be_hub_id(name):
        raise UserError(f"{name}: {no_such_folder(path)}, and not a hub id (owner/name)")
    return name


def no_such_folder(path: Path) -> str:
    """That there is none, and what is beside it by nearly that name."""
    there: list[str] = []
    with contextlib.suppress(OSError):  # of a parent that is not there either, or not to be read
        there = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    near = difflib.get_close_matches(path.name, there, n=1)
    return f"no such folder here (did you mean {path.parent / near[0]}?)" if near else "no such folder here"
