"""Progress on a terminal, in a log, and nothing on stdout."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pst.progress import note, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test sets clock[0]."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_note_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    note("one line")
    assert capsys.readouterr() == ("", "one line\n")


def test_a_log_gets_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 100) as advance:
        for _ in range(50):
            clock[0] += 1.0
            advance(2, "loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        "train: 20/100, 0:40 left loss 0.5",
        "train: 40/100, 0:30 left loss 0.5",
        "train: 60/100, 0:20 left loss 0.5",
        "train: 80/100, 0:10 left loss 0.5",
        "train: 100/100, 0:00 left loss 0.5",
    ]


def test_short_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 3) as advance:
        for _ in range(3):
            clock[0] += 0.5
            advance()
    assert capsys.readouterr() == ("", "")


def test_time_left_counts_only_what_this_process_did(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 1000, done=900) as advance:
        clock[0] += 60.0
        advance(50)
    assert capsys.readouterr().err == "train: 950/1000, 1:00 left\n"


def test_a_slow_first_step_tells_nothing_of_the_others(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("train", 350) as advance:
        clock[0] += 16.0
        advance(1, "sparsity 0.50")
        for _ in range(40):
            clock[0] += 0.25
            advance()
    assert capsys.readouterr().err.splitlines() == ["train: 1/350 sparsity 0.50", "train: 41/350, 1:17 left"]


def test_a_terminal_gets_a_bar_and_stdout_nothing() -> None:
    code = """
from pst.progress import progress
with progress("train", 4, done=1) as advance:
    for _ in range(3):
        advance(1, "loss 0.5")
"""
    ours, theirs = pty.openpty()
    ended = subprocess.run(
        [sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, check=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "train" in shown
    assert "4/4" in shown
    assert "loss 0.5" in shown
    assert ended.stdout == b""
