"""Processes of a command tell each other that they are alive."""

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
    """While this is open, the process tells the others that it is alive, and ends when one of them falls silent.

    A machine that loses its power or its network closes no connection, and those who wait for a process on it would
    wait for as long as a collective may take: hours, since the main process evaluates while the others wait. The main
    process listens to all others and tells them whom it misses; they listen to the main process. Beats are counted,
    not seconds: after a job was suspended as a whole, nobody is missed.

    A process that misses another ends at once, with one sentence and status 2. If the store is closed, because
    `torchrun` has ended, it sends itself SIGTERM instead, so that a training run saves.

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
            thread.join(beat)  # not longer, for the store may never answer
    # not after an exception: then the others shall miss this process
    with suppress(RuntimeError):  # closed already
        store.set(_name(rank), _LEFT)


class _Watchdog:
    def __init__(self, store: dist.Store, rank: int, world_size: int, beat: float):
        self.store, self.rank, self.world_size, self.beat = store, rank, world_size, beat
        self.stopped = threading.Event()
        self.talks = 0  # how often the store has answered

    def beats(self) -> None:
        """Sends beats, and counts those that the others miss."""
        others = range(1, self.world_size) if self.rank == 0 else range(1)
        names, host = [_name(other) for other in others], socket.gethostname()
        last, missed = [b""] * len(names), [0] * len(names)
        try:
            for count in itertools.count():
                self.store.set(_name(self.rank), f"{count} on {host}")
                if self.store.check(names):  # else some have not begun
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
        except RuntimeError:  # the store is closed, perhaps because the command is ending
            if not self.stopped.wait(self.beat):
                self.stopped.set()
                self._say("torchrun has ended, or the process through which the others are found")
                os.kill(os.getpid(), signal.SIGTERM)

    def answers(self) -> None:
        """Ends the process if the store's machine is gone, so that it does not answer."""
        missed, last = 0, 0
        while not self.stopped.wait(self.beat):
            missed, last = (missed + 1 if self.talks == last else 0), self.talks
            if missed == MISSED_BEATS:
                self._end("the machine through which the processes find each other does not answer")

    def _miss(self, other: int, host: str) -> None:
        message = f"process {other} of {self.world_size}, on {host}, has fallen silent"
        if self.rank == 0:
            self.store.set(_LOST, message)
            self.stopped.wait(2 * self.beat)  # so that the others read it before their connections break
        self._end(message)

    def _end(self, message: str) -> None:
        if not self.stopped.is_set():
            self._say(f"{message}; give the command again: a training goes on from its last checkpoint")
            os._exit(_STATUS)

    def _say(self, message: str) -> None:
        with suppress(OSError, ValueError):  # where nobody reads it any more, what follows matters all the more
            print(f"pixeldip: process {self.rank} of {self.world_size}: {message}", file=sys.stderr, flush=True)


def _name(rank: int) -> str:
    return f"beat {rank}"
