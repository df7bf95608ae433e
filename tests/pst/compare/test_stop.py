"""A grid that is stopped goes on where it was; several runs at a time give what one at a time gives, and never stay."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pst.batches import training_rows
from pst.train import InterruptedRun
from tests.pst.compare.grids import run_files, run_grid
from tests.pst.training import checkpoint_steps, options, weights

ENDLESS = ("steps=100000", "checkpoint_every=0")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def interrupt_in_run(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT to this process in the second step of the run of that *number*, from 1."""
    runs = iter(range(1, 100))

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        run = next(runs)
        for step, chosen in enumerate(training_rows(*args, **kwargs)):
            if run == number and step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield chosen

    monkeypatch.setattr("pst.train.training_rows", interrupted)


def once(ready: Callable[[], bool], act: Callable[[], None]) -> None:
    """From another thread, *act* as soon as *ready*, or after a minute all the same."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.05)
        act()

    threading.Thread(target=wait, daemon=True).start()


def is_training(output: Path, *names: str) -> bool:
    """Whether each of the runs has logged a step."""
    logs = [output / "runs" / name / "metrics.jsonl" for name in names]
    return all(log.is_file() and log.stat().st_size > 0 for log in logs)


def test_an_interrupted_grid_keeps_what_is_finished_and_ends_in_the_same_weights(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape: dict[str, Any] = {"methods": ("dense", "magnitude", "pst"), "patterns": ("2:4",), "seeds": 1}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    interrupt_in_run(2, monkeypatch)
    with pytest.raises(InterruptedRun, match="1 of 3 runs finished; the same command goes on"):
        run_grid(tiny_bert, reviews_file, stopped, **shape)
    monkeypatch.undo()
    assert checkpoint_steps(stopped / "runs" / "magnitude_2-4_0.5_seed0") == [2]
    so_far = json.loads((stopped / "report.json").read_text())
    assert [cell["name"] for cell in so_far["cells"]] == ["dense_seed0"]
    assert so_far["notes"][0].startswith("This is what 1 of 3 runs came to; the same command goes on")
    assert "1 of 3 runs" in (stopped / "report.md").read_text()
    finished = {path: seen for path, seen in run_files(stopped).items() if "dense_seed0" in path.parts}
    report = run_grid(tiny_bert, reviews_file, stopped, **shape)
    assert finished.items() <= run_files(stopped).items()
    assert all(row.value is not None and row.value.n == 1 for row in report.rows)
    assert not any("came to" in sentence for sentence in report.notes)
    run_grid(tiny_bert, reviews_file, whole, **shape)
    for name in ("dense_seed0", "magnitude_2-4_0.5_seed0", "pst_2-4_0.5_seed0"):
        assert weights(stopped / "runs" / name) == weights(whole / "runs" / name)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a process that shares the machine: sums of other threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_two_at_a_time_give_the_weights_of_one_at_a_time(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shape: dict[str, Any] = {"methods": ("dense",)}
    run_grid(tiny_bert, reviews_file, one, **shape)
    report = run_grid(tiny_bert, reviews_file, two, jobs=2, **shape)
    for seed in range(2):
        assert weights(two / "runs" / f"dense_seed{seed}") == weights(one / "runs" / f"dense_seed{seed}")
    assert report.rows[0].value is not None
    assert report.rows[0].value.n == 2
    assert any("2 runs shared this machine" in note for note in report.notes)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the processes in /proc")
def test_runs_beside_each_other_stop_with_a_checkpoint_and_a_killed_one_is_a_failure(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "grid"

    def kill_one_then_interrupt() -> None:
        os.kill(pid_of("dense_seed0"), signal.SIGKILL)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    def pid_of(name: str) -> int:
        found = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_worker(path, output / "runs" / name)]
        return int(found[0].parent.name)

    once(lambda: is_training(output, "dense_seed0", "dense_seed1"), kill_one_then_interrupt)
    with pytest.raises(InterruptedRun, match="0 of 2 runs finished"):
        run_grid(tiny_bert, reviews_file, output, methods=("dense",), jobs=2, sets=ENDLESS)
    assert "Failed: dense, seed 0: Its process ended with exit code -9" in capfd.readouterr().err
    assert len(checkpoint_steps(output / "runs" / "dense_seed1")) == 1
    assert [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_worker(path, output)] == []


def is_worker(path: Path, folder: Path) -> bool:
    try:
        words = path.read_bytes().split(b"\0")
    except OSError:
        return False
    return b"pst.compare.worker" in words and str(folder).encode() in b" ".join(words)


def test_a_run_stops_when_the_comparison_is_gone(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs" / "dense_seed0"
    config = options(tiny_bert, reviews_file, method="dense", steps=100000, checkpoint_every=0)
    process = subprocess.Popen(
        [sys.executable, "-m", "pst.compare.worker", str(output), json.dumps(asdict(config))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    once(lambda: is_training(tmp_path, "dense_seed0"), process.stdin.close)
    assert process.wait(timeout=90) == 130
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.stdout.close()
    assert len(checkpoint_steps(output)) == 1
