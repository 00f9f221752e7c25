"""What a run says while it goes on: the terminal, metrics.jsonl, and trackers where installed."""

import contextlib
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..errors import UserError, in_one_line
from ..evaluation import Evaluation
from ..files import write_text
from ..processes import Processes
from ..recipe import Recipe, recipe_values
from ..run_folder import LOG
from ..terminal import clock, say, warn
from .devices import peak_flops

SLOW_IMAGES = 0.1  # of the time, waited for images, from which on the log says so


class Progress:
    """Logs a run from its main process; in the others it does nothing. Use as a context manager."""

    def __init__(self, run: Path, recipe: Recipe, console: Console, first_step: int, processes: Processes):
        self.recipe, self.console, self.processes = recipe, console, processes
        self.started = time.perf_counter()
        self.paused = 0.0
        self._waited = 0.0
        names = recipe.logging.trackers if processes.is_main else ()
        self.trackers = processes.together(lambda: [_tracker(name, run, recipe, first_step) for name in names])
        self._log = (run / LOG if processes.is_main else Path(os.devnull)).open("a+b")
        self._end_half_a_line()
        self._status = console.status("starting") if console.is_terminal and processes.is_main else None
        self._window = (self.started, first_step)

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._status:
            self._status.stop()
        if kind:
            with contextlib.suppress(OSError):  # of a disk that is full; the error itself goes on
                self.event("failed", why=(str(error) or kind.__name__).splitlines()[0])
        self._log.close()
        for tracker in self.trackers:
            tracker.close()

    def event(self, name: str, **values: Any) -> None:
        """A line of metrics.jsonl that is not a logged step."""
        self._write({"event": name, "time": round(time.time(), 3), **values})

    def step(self, step: int, flops_per_image: int | None, waited: float, **values: float) -> None:
        """Logs the step count reached and its metrics; adds speed, time left, memory and utilisation.

        Args:
            waited: seconds for which the main process has waited for images since the start.
        """
        now = time.perf_counter()
        (then, last), self._window = self._window, (now, step)
        batch_size = self.recipe.training.batch_size
        training = max(now - then - self.paused, 1e-9)
        rate = batch_size * (step - last) / training
        self.paused = 0.0
        waiting, self._waited = (waited - self._waited) / training, waited
        left = (self.recipe.training.steps - step) * batch_size / rate
        entry: dict[str, float] = {
            "step": step,
            **values,
            "images_per_second": round(rate, 2),
            "waiting_for_images": round(waiting, 3),
            "seconds": round(now - self.started, 2),
        }
        line = f"step {step}/{self.recipe.training.steps}  loss {values['loss']:.4f}"
        line += f"  {rate:.0f} images/s  {clock(left)} left"
        if waiting > SLOW_IMAGES:
            line += f"  waiting for images {waiting:.0%}"
        device = self.processes.device
        if device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
            line += f"  {entry['memory_gib']:.1f} GiB"
            peak = peak_flops(device)
            if peak and flops_per_image:
                entry["mfu"] = round(rate * flops_per_image / (peak * self.processes.world_size), 4)
                line += f"  MFU {entry['mfu']:.0%}"
        self._write(entry)
        for tracker in self.trackers:
            tracker.log({k: v for k, v in entry.items() if k != "step"}, step)
        if self._status:
            self._status.update(line)
        else:
            say(self.console, line)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Logs the metrics of the weights after a step, with what real images score."""
        self.event("evaluation", step=step, metrics=evaluation.metrics, floors=evaluation.floors)
        for tracker in self.trackers:
            tracker.log({f"evaluation/{name}": value for name, value in evaluation.metrics.items()}, step)
        values = "  ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
        say(self.console, f"step {step}: {values}")

    def divergence(self, steps: list[dict[str, Any]]) -> None:
        """Records the steps that were left out because they diverged."""
        for step in steps:
            self.event("divergence", **step)
            left_out = f"step {step['step']} diverged and was left out: loss {step['loss']:.4g}, gradient norm "
            warn(self.console, f"{left_out}{step['gradient_norm']:.4g}")

    def pause(self, seconds: float) -> None:
        """Time since the last logged step that was not training (a preview, a checkpoint)."""
        self.paused += seconds

    def _write(self, entry: dict[str, Any]) -> None:
        self._log.write((json.dumps(_named(entry)) + "\n").encode())
        self._log.flush()

    def _end_half_a_line(self) -> None:
        """What a run was writing when it was killed must not swallow the next line."""
        if self._log.seek(0, os.SEEK_END):
            self._log.seek(-1, os.SEEK_END)
            if self._log.read(1) != b"\n":
                self._log.write(b"\n")


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no spelling for, as "nan" and "inf"."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}


def _tracker(name: str, run: Path, recipe: Recipe, first_step: int) -> Any:
    try:
        return _TRACKERS[name](run, recipe, first_step)
    except Exception as error:  # of their own kinds, such as wandb's of a missing key
        raise UserError(f"logging.trackers: {name} cannot be started ({in_one_line(error)})") from error


class _TensorBoard:
    def __init__(self, run: Path, recipe: Recipe, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=first_step + 1)  # what a resume goes back behind

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    def __init__(self, package: str, recipe: Recipe, **run: Any):
        self.module = importlib.import_module(package)
        self.module.init(project=recipe.logging.project, config=recipe_values(recipe), resume="allow", **run)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def _wandb(run: Path, recipe: Recipe, first_step: int) -> _WandbLike:
    return _WandbLike("wandb", recipe, name=run.name, dir=run, id=_run_id(run / "wandb", first_step))


def _trackio(run: Path, recipe: Recipe, first_step: int) -> _WandbLike:
    return _WandbLike("trackio", recipe, name=f"{run.name}-{_run_id(run / 'trackio', first_step)}")  # resumed by name


def _run_id(folder: Path, first_step: int) -> str:
    """What tells a run from others of its name: that of before where it is resumed."""
    file = folder / "run-id"
    if not first_step or not file.is_file():
        folder.mkdir(exist_ok=True)
        write_text(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


_TRACKERS: dict[str, Callable[..., Any]] = {"tensorboard": _TensorBoard, "wandb": _wandb, "trackio": _trackio}
