"""Processes that miss another one end, whatever they wait for. Real processes, stopped as if their machine were off."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pixeldip.heartbeat import MISSED_BEATS

from .conftest import PATIENCE

BEAT = 0.2  # seconds
MISSED = MISSED_BEATS * BEAT
ALIVE = """
import sys
import torch.distributed as dist
from pixeldip.heartbeat import heartbeat

port, rank, beat = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with heartbeat(dist.TCPStore("127.0.0.1", port, is_master=False), rank, 3, beat):
    print("began", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise SystemExit(3)
"""
SERVER = """
import sys
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.readline()
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, **pipes)


@pytest.fixture
def server() -> Iterator[subprocess.Popen]:
    with start(SERVER) as process:
        yield process
        process.kill()


@pytest.fixture
def three(server: subprocess.Popen) -> Iterator[list[subprocess.Popen]]:
    port = server.stdout.readline().strip()
    processes = [start(ALIVE, port, rank, BEAT) for rank in range(3)]
    assert [process.stdout.readline() for process in processes] == ["began\n"] * 3
    time.sleep(2 * BEAT)  # all have heard of each other
    yield processes
    for process in processes:
        with process:
            process.kill()


def send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its status and what it said; its input stays open, for that of one which lives is its end."""
    status = process.wait(PATIENCE)
    return status, process.stderr.read()


def test_nobody_is_missed_who_leaves_or_is_suspended_with_the_others(three: list[subprocess.Popen]) -> None:
    main, one, two = three
    assert two.communicate("leave\n", timeout=PATIENCE) == ("", "") and two.returncode == 0
    send([main, one], signal.SIGSTOP)
    time.sleep(1.5 * MISSED)
    send([main, one], signal.SIGCONT)
    time.sleep(1.5 * MISSED)
    assert [process.communicate("leave\n", timeout=PATIENCE)[1] for process in (main, one)] == ["", ""]
    assert main.returncode == one.returncode == 0


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_gone_ends_the_others(gone: int, three: list[subprocess.Popen]) -> None:
    send([three[gone]], signal.SIGSTOP)
    for process in (process for rank, process in enumerate(three) if rank != gone):
        status, errors = ended(process)
        assert status == 2 and f"process {gone} of 3, on " in errors and "has fallen silent; give" in errors


def test_a_process_whose_errors_nobody_reads_ends_too(three: list[subprocess.Popen]) -> None:
    main, one, _ = three
    main.stderr.close()
    send([one], signal.SIGSTOP)
    assert main.wait(PATIENCE) == 2


def test_who_ends_by_an_error_is_missed(three: list[subprocess.Popen]) -> None:
    main, one, two = three
    one.communicate("fail\n", timeout=PATIENCE)
    assert one.returncode == 3
    assert all(status == 2 and "process 1 of 3" in errors for status, errors in map(ended, (main, two)))


def test_without_the_store_a_process_is_asked_to_end(three: list[subprocess.Popen], server: subprocess.Popen) -> None:
    server.kill()
    for process in three:
        status, errors = ended(process)
        assert status == -signal.SIGTERM and "torchrun has ended" in errors


def test_a_store_that_never_answers_ends_all(three: list[subprocess.Popen], server: subprocess.Popen) -> None:
    server.send_signal(signal.SIGSTOP)
    assert all(status == 2 and "does not answer" in errors for status, errors in map(ended, three))
