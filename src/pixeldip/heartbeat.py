"""Processes of a command tell each other that they live."""

import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

BEAT = 5.0  # seconds
MISSED_BEATS = 12  # in a row, after which a process is taken for gone

_LEFT = b"left"
_LOST = "lost"
_STATUS = 2  # as of every message without a stack trace


@contextmanager
def heartbeat(store: dist.Store, rank: int, world_size: int, beat: float = BEAT) -> Iterator[None]:
    """In here this process tells the others that it lives, and ends when it does not hear of them any more.

    A machine that loses its power or its network closes no connection, and who waits for a process on it waits for as
    long as a collective may take: hours, since the main process evaluates while others wait. The main process hears
    all others and passes on whom it misses; they hear the main process. Beats are counted, not seconds: a job that is
    suspended as a whole has missed none when it goes on.

    Who misses another process ends at once, with one sentence and status 2. When the store has been closed, by the end
    of `torchrun`, this process sends itself SIGTERM, so that a training saves.

    Args:
        beat: seconds between two beats.
    """
    watchdog = _Watchdog(store.clone(), rank, world_size, beat)
    threads = [threading.Thread(target=work, daemon=True) for work in (watchdog.beats, watchdog.answers)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watchdog.stopped.set()
        for thread in threads:
            thread.join(beat)  # in vain if the store never answers
    with suppress(RuntimeError):  # closed already; after an exception the others are to miss this process
        store.set(_name(rank), _LEFT)


class _Watchdog:
    def __init__(self, store: dist.Store, rank: int, world_size: int, beat: float):
        self.store, self.rank, self.world_size, self.beat = store, rank, world_size, beat
        self.stopped = threading.Event()
        self.talks = 0  # how often the store has answered

    def beats(self) -> None:
        """Says a beat, and counts those that others miss."""
        others = range(1, self.world_size) if self.rank == 0 else range(1)
        names, host = [_name(other) for other in others], socket.gethostname()
        last, missed = [b""] * len(names), [0] * len(names)
        try:
            for count in itertools.count():
                self.store.set(_name(self.rank), f"{count} on {host}")
                if self.store.check(names):  # or some have not begun
                    heard = self.store.multi_get(names)
                    changed = [now != before or now == _LEFT for now, before in zip(heard, last)]
                    last, missed = heard, [0 if is_new else n + 1 for is_new, n in zip(changed, missed)]
                if self.store.check([_LOST]):
                    self._end(self.store.get(_LOST).decode())
                if MISSED_BEATS in missed:
                    place = missed.index(MISSED_BEATS)
                    self._miss(others[place], last[place].decode().partition(" on ")[2])
                self.talks += 1
                if self.stopped.wait(self.beat):
                    return
        except RuntimeError:  # the store has been closed, perhaps since the command is ending
            if not self.stopped.wait(self.beat):
                self.stopped.set()
                self._say("torchrun has ended, or the process through which the others are found")
                os.kill(os.getpid(), signal.SIGTERM)

    def answers(self) -> None:
        """Ends the process if a store on a machine that is gone does not answer."""
        missed, last = 0, 0
        while not self.stopped.wait(self.beat):
            missed, last = (missed + 1 if self.talks == last else 0), self.talks
            if missed == MISSED_BEATS:
                self._end("the machine through which the processes find each other does not answer")

    def _miss(self, other: int, host: str) -> None:
        message = f"process {other} of {self.world_size}, on {host}, is not heard of any more"
        if self.rank == 0:
            self.store.set(_LOST, message)
            self.stopped.wait(2 * self.beat)  # the others hear of it before their connections to this process break
        self._end(message)

    def _end(self, message: str) -> None:
        if not self.stopped.is_set():
            self._say(f"{message}; give the command again: a training goes on from its last checkpoint")
            os._exit(_STATUS)

    def _say(self, message: str) -> None:
        print(f"pixeldip: process {self.rank} of {self.world_size}: {message}", file=sys.stderr, flush=True)


def _name(rank: int) -> str:
    return f"beat {rank}"
