"""Several runs at a time, each in a process of its own, so that small ones fill a GPU and large ones several.

Processes are asked to stop by SIGTERM, on which they write a checkpoint. Each also holds the reading end of a pipe from
this process and stops when it closes: no run outlives a comparison that was killed.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pst.compare.attempt import announce, is_finished, missing_dense
from pst.compare.grid import Cell
from pst.errors import StorageError
from pst.files import storage_errors
from pst.progress import note

POLL_S = 0.05
STOP_S = 60.0
"""How long a process may take for its checkpoint after it was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    cell: Cell
    slot: int
    """0 to jobs - 1, each held by one process at a time."""
    process: "subprocess.Popen[str]"


def several_at_a_time(
    waiting: Sequence[Cell], runs: Path, *, jobs: int, errors: dict[str, str], after: Callable[[], None]
) -> None:
    """Train the *waiting* cells, *jobs* at a time, put the sentences of those that fail into *errors*, by name.

    *after* is called after each. A cell waits for the dense run that it needs. Raises StorageError, and
    pst.train.InterruptedRun after a signal.
    """
    from pst.signals import stop_signals
    from pst.train import InterruptedRun

    queue, running = list(waiting), list[_Job]()
    start = time.monotonic()
    with stop_signals() as stopped:
        try:
            while queue or running:
                if stopped():
                    raise InterruptedRun
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    _take(errors, job.cell, _answer(job, runs))
                    after()
                for cell in [cell for cell in queue if _is_ready(cell, queue, running)]:
                    if (error := missing_dense(cell, runs)) is not None:
                        _take(errors, cell, error)
                        after()
                    elif len(running) < jobs:
                        begun, done = len(waiting) - len(queue), len(waiting) - len(queue) - len(running)
                        pace = (time.monotonic() - start) / done if done else None
                        announce(cell, begun + 1, len(waiting), left_s=pace and pace * (len(queue) + len(running)))
                        slot = min(set(range(jobs)) - {job.slot for job in running})
                        running.append(_start(cell, runs, slot=slot, jobs=jobs))
                    else:
                        continue
                    queue.remove(cell)
                time.sleep(POLL_S)
        finally:
            stop([job.process for job in running])


def _is_ready(cell: Cell, queue: Sequence[Cell], running: Sequence[_Job]) -> bool:
    return cell.dense not in {*(other.name for other in queue), *(job.cell.name for job in running)}


def _take(errors: dict[str, str], cell: Cell, error: str | None) -> None:
    if error is not None:
        errors[cell.name] = error
        note(f"Failed: {cell.label}: {error}")


def _start(cell: Cell, runs: Path, *, slot: int, jobs: int) -> _Job:
    import torch

    config = cell.config
    if config.device in ("auto", "cuda") and torch.cuda.device_count() > 1:
        config = replace(config, device=f"cuda:{slot % torch.cuda.device_count()}")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cpus // jobs)), **os.environ}
    command = [sys.executable, "-m", "pst.compare.worker", str(runs / cell.name), json.dumps(asdict(config))]
    with storage_errors(runs):
        runs.mkdir(parents=True, exist_ok=True)
    with storage_errors(runs), _log(cell, runs).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C on the terminal reaches this process alone, which hands it on
        )
    return _Job(cell=cell, slot=slot, process=process)


def _log(cell: Cell, runs: Path) -> Path:
    return runs / f"{cell.name}.log"


def _answer(job: _Job, runs: Path) -> str | None:
    """The sentence of a process that has ended, or None where its run is finished."""
    assert job.process.stdout is not None
    said = job.process.stdout.read()
    close(job.process)
    if job.process.returncode == 0:
        answer: dict[str, str | None] = json.loads(said)
        if answer["storage"] is not None:
            raise StorageError(answer["storage"])
        return answer["error"]
    if is_finished(runs / job.cell.name):
        return None
    return f"Its process ended with exit code {job.process.returncode}; see {_log(job.cell, runs)}."


def stop(processes: "Sequence[subprocess.Popen[Any]]", *, seconds: float = STOP_S) -> None:
    """Ask all to stop, wait *seconds* for their checkpoints, and end those that have not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        close(process)


def close(process: "subprocess.Popen[Any]") -> None:
    """Close its pipes."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
