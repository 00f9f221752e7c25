"""Sampling that a page can watch, and stop."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..flow import seeded_normal, start_state, time_grid
from ..images import display_scale, grid, to_pil
from ..sampling import SampledImages
from ..terminal import clock

Told = TypeVar("Told")
_END = object()

SECONDS_BETWEEN_VIEWS = 0.2
PATH_MOMENTS = 25  # states of a path that are kept for the slider
SHOWN_PIXELS = 192  # a picture's width on the page, about
SHEET_PIXELS = 1536  # a sheet's width at most; the gallery has the pictures themselves


@dataclass(frozen=True)
class Moment:
    """A batch on its way: the time, the noisy images x_t, and the images they are heading for, as grids."""

    t: float
    noisy: Image.Image
    heading: Image.Image


@dataclass(frozen=True)
class View:
    """What there is to see of a batch that is being sampled.

    Attributes:
        line: progress, rate and time left.
        path: the moments kept so far, and this one; at the end the last of them is the result.
        pixels: the result, uint8 (n, H, W, 3), once it is there.
    """

    line: str
    now: Moment
    path: tuple[Moment, ...]
    pixels: np.ndarray | None = None


def watch(images: SampledImages) -> Iterator[View]:
    """Samples all the images in one batch; yields views while it goes on, and the finished one.

    Closing the iterator stops the sampling after its step.

    Raises:
        UserError: as `SampledImages.read` does.
    """
    steps = images.settings.steps
    every = max(1, -(-steps // (PATH_MOMENTS - 1)))
    state, pace = _State(images), Pace(steps)
    path = [state.moment()]
    yield View("starting", path[0], tuple(path))
    results = []
    work = watched(lambda tell: results.append(images.read(0, len(images), lambda *step: tell(step))))
    with contextlib.closing(work) as stepping:
        for step, t, x, predicted in stepping:
            state.reached(t, x, predicted)
            done = step + 1
            keep = done % every == 0 or done == steps
            if keep:
                path.append(state.moment())
            if pace.due():
                now = path[-1] if keep else state.moment()
                yield View(pace.line(done), now, tuple(path) if keep else (*path, now))
    seconds = pace.seconds()
    line = f"{len(images)} images in {seconds:.1f} s, {steps / seconds:.1f} steps/s"
    yield View(line, path[-1], tuple(path), results[0])


def sheet(x: Tensor, columns: int = 4) -> Image.Image:
    """Images (n, C, H, W) in [-1, 1] as one picture, each enlarged to a size that can be judged."""
    pictures, columns = to_pil(x), min(columns, len(x))
    if (factor := round(pictures[0].width * columns / SHEET_PIXELS)) > 1:
        pictures = [picture.reduce(factor) for picture in pictures]
    return grid(pictures, columns, scale=display_scale(pictures[0].width, SHOWN_PIXELS))


class Pace:
    """Progress, rate and time left of so many steps, and when it is time to show something again."""

    def __init__(self, steps: int):
        self.steps = steps
        self.began = self.shown = time.perf_counter()

    def due(self) -> bool:
        """Whether something was last shown long enough ago; if so, it counts as shown now."""
        now = time.perf_counter()
        due = now - self.shown > SECONDS_BETWEEN_VIEWS
        self.shown = now if due else self.shown
        return due

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def line(self, done: int) -> str:
        rate = done / self.seconds()
        return f"step {done}/{self.steps} · {rate:.1f} steps/s · {clock((self.steps - done) / rate)} left"


class _State:
    """The state of a batch, and where it is heading: the image that the last step predicted, and at last the result."""

    def __init__(self, images: SampledImages):
        settings, config = images.settings, images.pipeline.model.config
        times = time_grid(settings.steps, settings.time_shift, images.pipeline.model.objective)
        self.t = times[0]
        self.x = start_state(seeded_normal(images.seeds, (config.in_channels, images.height, images.width)), times)
        self.heading = self.x

    def reached(self, t: float, x: Tensor, predicted: Tensor) -> None:
        self.t, self.x = t, x.float().cpu()
        self.heading = predicted.float().cpu() if t < 1 else self.x

    def moment(self) -> Moment:
        return Moment(self.t, sheet(self.x), sheet(self.heading))


_closing = threading.Event()
_one_at_a_time = threading.Lock()


def stop_all() -> None:
    """Ends all watched work the next time it tells something, for good: the program is closing."""
    _closing.set()


class _Stopped(Exception):
    """Ends work that nobody waits for any more."""


def watched(work: Callable[[Callable[[Told], None]], object]) -> Iterator[Told]:
    """Runs `work(tell)` in a thread of its own, one work at a time, and yields what it tells.

    Closing the iterator stops the work the next time it tells something, and does not wait for it. What the work
    raises is raised here.
    """
    told: queue.Queue = queue.Queue(maxsize=2)  # a slow page slows the work, and does not pile up its states
    stop = threading.Event()
    failure: list[Exception] = []

    def put(news: object) -> None:
        while not (stop.is_set() or _closing.is_set()):
            try:
                return told.put(news, timeout=0.1)
            except queue.Full:
                continue
        raise _Stopped

    def run() -> None:
        try:
            with _one_at_a_time:
                work(put)
        except _Stopped:
            return
        except Exception as error:
            failure.append(error)
        with contextlib.suppress(_Stopped):
            put(_END)

    def take() -> object:
        while not _closing.is_set():
            try:
                return told.get(timeout=0.1)
            except queue.Empty:
                continue
        raise UserError("the page has been closed")  # else who waits here would keep the program from ending

    threading.Thread(target=run, daemon=True).start()
    try:
        yield from iter(take, _END)
    finally:
        stop.set()
    if failure:
        raise failure[0]
