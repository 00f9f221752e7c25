import io

import pytest
from rich.console import Console

from pixeldip import terminal


def test_a_log_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: now[0])
    file = io.StringIO()
    with terminal.progress(Console(file=file)) as start:
        advance = start("Samples", 300)
        for _ in range(6):
            now[0] += 25
            advance(50)
    assert file.getvalue().splitlines() == [
        "Samples 100/300  2.0 images/s  1:40 left",
        "Samples 200/300  2.0 images/s  0:50 left",
        "Samples 300/300  2.0 images/s",
    ]


def test_durations() -> None:
    assert [terminal.clock(s) for s in (0.4, 59.6, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]
