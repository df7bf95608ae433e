"""A run that is stopped or killed at any moment loses no checkpoint, and ends in the weights of one that was not.

Real processes and real signals: see fork_server.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pst import checkpoint
from pst.config import TrainConfig
from tests.pst.training import checkpoint_steps, leftovers, log_lines, options, weights

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

Fork = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fork]:
    """``fork(config, output, resume=False, stop=None, pause=0.0)``: one run in a process of its own; its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    log = tmp_path_factory.mktemp("fork") / "stderr"
    with log.open("w") as stderr:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.pst.fork_server"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(
        config: TrainConfig,
        output: Path,
        *,
        resume: bool = False,
        stop: dict[str, Any] | None = None,
        pause: float = 0.0,
    ) -> dict[str, Any]:
        request = {"config": asdict(config), "output": str(output), "resume": resume, "stop": stop, "pause": pause}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, log.read_text()
        result: dict[str, Any] = json.loads(answer)
        return result

    yield run
    stdin.close()
    stdout.close()
    assert server.wait(timeout=60) == 0, log.read_text()


def newest_step(output: Path) -> int:
    """The step of the newest checkpoint on disk, which must be whole; -1 where there is none."""
    steps = checkpoint_steps(output)
    if not steps:
        return -1
    state = checkpoint.load_last(output / "checkpoints")
    assert state is not None
    assert state["step"] == steps[-1], "the newest checkpoint was damaged"
    return steps[-1]


@pytest.mark.parametrize(
    "changes",
    [{"mask_every": 2}, {"method": "dense"}, {"pattern": "2:4", "eval_every": 5}],
    ids=["pst", "dense", "2:4"],
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_leave_a_checkpoint_to_continue_from(
    name: str, changes: dict[str, Any], fork: Fork, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    config = options(tiny_bert, reviews_file, **changes, steps=21, checkpoint_every=0)
    assert fork(config, tmp_path / "whole") == {"code": 0, "error": ""}
    output, done = tmp_path / "stopped", 0
    for more in (1, 6, 11):  # the steps that each process makes before the signal comes
        ended = fork(config, output, resume=True, stop={"signal": name, "event": "step", "count": more})
        done += more
        message = f"InterruptedRun: Stopped at step {done} of 21; continue with --resume --output {output}."
        assert ended == {"code": 0, "error": message}
        assert newest_step(output) == done
        assert not (output / "model").exists()
    assert fork(config, output, resume=True) == {"code": 0, "error": ""}
    assert weights(output) == weights(tmp_path / "whole")
    assert log_lines(output) == log_lines(tmp_path / "whole")
    assert leftovers(output) == []
    assert not (output / "checkpoints").exists()


def test_twenty_kills_lose_nothing(fork: Fork, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """Ten at a random time, seven in or near the writing of a checkpoint, three at exact instructions of it."""
    config = options(tiny_bert, reviews_file, steps=90, checkpoint_every=3, eval_every=7, mask_every=2)
    assert fork(config, tmp_path / "whole") == {"code": 0, "error": ""}
    expected, expected_log = weights(tmp_path / "whole"), log_lines(tmp_path / "whole")
    draw = random.Random(20)
    stops = [{"event": "step", "count": draw.randint(1, 12), "delay": draw.uniform(0, 0.02)} for _ in range(10)]
    stops += [{"event": "half", "count": draw.randint(1, 4), "delay": draw.uniform(0, 0.03)} for _ in range(7)]
    stops += [{"event": event, "count": draw.randint(3, 5)} for event in ("half", "replace", "replaced")]
    draw.shuffle(stops)

    kills = cut_short = runs = 0
    while kills < 20 or runs == 0:  # a run that comes to its end before the twentieth kill is followed by another
        output, before = tmp_path / f"run{runs}", -1
        while True:
            stop = {**stops[kills], "signal": "SIGKILL"} if kills < 20 else None
            ended = fork(config, output, resume=True, stop=stop, pause=0.02)
            assert ended["error"] == ""
            if ended["code"] == 0:
                break
            assert ended["code"] == -signal.SIGKILL
            kills += 1
            cut_short += bool(leftovers(output))
            if not (output / "model").exists():
                assert newest_step(output) >= before
                before = newest_step(output)
        runs += 1
        assert weights(output) == expected
        assert log_lines(output) == expected_log
        assert leftovers(output) == []
        assert not (output / "checkpoints").exists()
    assert kills == 20
    assert cut_short >= 2  # of these two the place is exact


@pytest.mark.parametrize("event", ["rename", "renamed"])
def test_a_kill_around_the_result(event: str, fork: Fork, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """Before the model gets its name the run is not finished; after it the run is, whatever else was left to do."""
    config = options(tiny_bert, reviews_file, checkpoint_every=5)
    fork(config, tmp_path / "whole")
    output = tmp_path / "killed"
    ended = fork(config, output, stop={"signal": "SIGKILL", "event": event, "count": 1})
    assert ended["code"] == -signal.SIGKILL
    assert (output / "model").exists() == (event == "renamed")
    assert newest_step(output) == 10
    assert fork(config, output, resume=True) == {"code": 0, "error": ""}
    assert weights(output) == weights(tmp_path / "whole")
    assert log_lines(output) == log_lines(tmp_path / "whole")
    assert {path.name for path in output.iterdir()} - {"tensorboard"} == {"config.yaml", "metrics.jsonl", "model"}


def test_a_kill_before_the_first_checkpoint(fork: Fork, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    config = options(tiny_bert, reviews_file)
    fork(config, tmp_path / "whole")
    for count in (1, 2, 3):  # the log, the settings, then the first rename of a file that saving the result makes
        output = tmp_path / f"killed{count}"
        ended = fork(config, output, stop={"signal": "SIGKILL", "event": "replace", "count": count})
        assert ended["code"] == -signal.SIGKILL
        assert newest_step(output) == -1
        assert fork(config, output, resume=True) == {"code": 0, "error": ""}
        assert weights(output) == weights(tmp_path / "whole")
        assert leftovers(output) == []
