"""How bad input must be refused, and folders to damage."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..command_line import NO_COMPILER, done, interrupted_run, pst, snapshot

Refused = Callable[..., str]
TRAIN = ("--sparsity", "0.5", "--steps", "4", "--set", "batch_size=8", "--set", "r1=2", "--set", "r2=2")
LONGEST = 500  # characters: three lines of a wide terminal, with pytest's long paths


@pytest.fixture(scope="session")
def model(sparse_model: Callable[..., Path]) -> Path:
    """A 2:4 model folder. Read only."""
    return sparse_model("2:4")


@pytest.fixture(scope="session")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact. Read only; ``artifact`` is a copy that a test may damage."""
    output = tmp_path_factory.mktemp("exported") / "artifact"
    done("export", model, "--output", output)
    return output


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy of the artifact."""
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


@pytest.fixture(scope="session")
def external(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that keeps its weights in model.onnx.data. Read only."""
    output = tmp_path_factory.mktemp("external") / "artifact"
    done("export", model, "--output", output, "--external-data")
    return output


@pytest.fixture(scope="session")
def stopped_run(tiny_bert: Path, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted. Read only; ``interrupted`` is a copy."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    interrupted_run(output, "--model", tiny_bert, "--data", reviews_file, *TRAIN)
    return output


@pytest.fixture
def interrupted(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of an interrupted run with checkpoints of the steps 1 and 2 of 4."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """``refused("eval", ..., says="remedy")`` runs the command in tmp_path, checks how it fails, gives its message."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: str | Path, says: str | tuple[str, ...], runs_until_failure: bool = False) -> str:
        before = snapshot(tmp_path)
        outcome = pst(*arguments)
        lines = [line for line in outcome.err.splitlines() if not line.startswith(NO_COMPILER)]
        message = lines[-1] if lines else ""
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert message.startswith("Error: ")
        assert sum(line.startswith("Error") for line in lines) == 1, outcome.err
        assert "Traceback" not in outcome.err
        assert runs_until_failure or len(lines) == 1, outcome.err
        assert len(message) <= LONGEST, message
        for words in (says,) if isinstance(says, str) else says:
            assert words in message
        assert snapshot(tmp_path) == before
        return message

    return check


def rows(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def train(model: Path | str, data: Path | str, *more: str | Path) -> tuple[str | Path, ...]:
    return ("train", "--model", model, "--data", data, "--output", "new", *TRAIN, *more)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def harm(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    new = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"not this", "flipped": content}
    path.write_bytes(bytes(new[damage]))


def every_reader(artifact: str, data: Path) -> Iterator[tuple[str | Path, ...]]:
    yield "eval", artifact, "--data", data
    yield "bench", artifact, "--shapes", "1x8", "--output", "report"
    yield "inspect", artifact
    yield "serve", artifact, "--port", "0"
