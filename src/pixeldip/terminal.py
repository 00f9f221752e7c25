"""What commands show: warnings, and of long work progress, rate and time left."""

import errno
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[float], None]
StartPass = Callable[[str, int], Advance]
"""Given a title and how many there are, starts a pass over them, and returns what to call with the (possibly
fractional) number just done."""
SECONDS_BETWEEN_LINES = 30.0


def clock(seconds: float) -> str:
    """A duration as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def printable(text: str, one_line: bool = False) -> str:
    """Text of strangers (names of files and classes), its control characters and broken Unicode as escapes.

    Args:
        one_line: line ends as escapes, too.
    """
    kept = "" if one_line else "\n"
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cs") and c not in kept else c for c in text)


class PlainConsole(Console):
    """A console for text with names of strangers in it: nothing in a string is markup or a control sequence.

    Attributes:
        when_unread: called once the reader of the output, such as `head`, has closed the pipe, and nothing is printed
            from then on; without it, BrokenPipeError is raised, for the command line to end with.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self.when_unread: Callable[[], None] | None = None

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """What rich calls; its own way is to end the process as for a fault."""
        if not self.when_unread:
            raise BrokenPipeError(errno.EPIPE, "what read the output has ended")
        drop_output()
        self.quiet = True
        self.when_unread()


def drop_output() -> None:
    """What stdout still holds goes nowhere; or Python's last flush would raise once more what has kept it there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(console: Console, text: str, style: str = "") -> None:
    """A line as it is, on any console: names in it are no markup, and it is not cut where a log file would be."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """A line that limits what was or will be done."""
    say(console, f"warning: {text}", "yellow")


@contextmanager
def quieted(logger_name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Lets a library's logger say nothing below a level."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Rate(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} {self.unit}/s" if task.speed else "")


@contextmanager
def progress(console: Console, unit: str = "images") -> Iterator[StartPass]:
    """Yields what starts a pass. A terminal gets a bar per pass; a log file gets a line every half minute."""
    if not console.is_terminal:
        yield lambda title, total: _lines(console, title, total, unit)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:

        def start(title: str, total: int) -> Advance:
            task = bars.add_task(title, total=total)
            return lambda n: bars.advance(task, n)

        yield start


def _lines(console: Console, title: str, total: int, unit: str) -> Advance:
    began = said = time.perf_counter()
    done = 0.0

    def advance(n: float) -> None:
        nonlocal said, done
        done += n
        now = time.perf_counter()
        finished = done >= total - 1e-6
        if finished or now - said >= SECONDS_BETWEEN_LINES:
            said = now
            rate = done / max(now - began, 1e-9)
            left = "" if finished else f"  {clock((total - done) / rate)} left"
            say(console, f"{title} {round(done)}/{total}  {rate:.1f} {unit}/s{left}")

    return advance


def some(names: Sequence[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
