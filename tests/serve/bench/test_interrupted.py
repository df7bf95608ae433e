"""Ctrl-C while pst bench measures: what was measured is kept, and the report says what is missing."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import serve.bench.openings
import serve.bench.runner
from serve.bench.openings import LEAST_OPENINGS

from ...command_line import pst


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``stop_at(module, name, call)``: a SIGINT instead of that call, from 1, of the function."""

    def set_up(module: Any, name: str, call: int) -> None:
        function, calls = getattr(module, name), iter(range(1, 1000))

        def stopping(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, stopping)

    return set_up


def _bench(paths: list[Path], output: Path, *more: str | Path) -> tuple[int, str]:
    options = ["--shapes", "1x4,1x8,2x8", "--threads", "1", "--warmup", "1", "--runs", "2", "--precision", "0"]
    outcome = pst("bench", *paths, *options, "--output", output, *more)
    return outcome.code, outcome.out


def test_the_shapes_before_it_are_reported(
    bert_artifact: Path, sparse_artifact: Path, reviews_file: Path, tmp_path: Path, stop_at: Any
) -> None:
    stop_at(serve.bench.openings, "measure_in_turn", 3)
    code, out = _bench([bert_artifact, sparse_artifact], tmp_path / "r", "--data", reviews_file)
    assert code == 130
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert list(dict.fromkeys(entry["workload"] for entry in report["measurements"])) == ["1x4", "1x8"]
    assert list(report["stopped"]) == ["1x4", "1x8"]
    assert report["unmeasured"] == ["2x8", "1 x text", "the accuracy", "the receipts"]
    assert report["receipts"] == []
    assert "Interrupted before 2x8, 1 x text, the accuracy, the receipts." in out
    assert (tmp_path / "r" / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "left"), [("evaluate", ["the accuracy", "the receipts"]), ("receipts", ["the receipts"])]
)
def test_what_comes_after_the_times(
    bert_artifact: Path, reviews_file: Path, tmp_path: Path, stop_at: Any, name: str, left: list[str]
) -> None:
    stop_at(serve.bench.runner, name, 1)
    code, _ = _bench([bert_artifact], tmp_path / "r", "--data", reviews_file)
    assert code == 130
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["unmeasured"] == left
    assert len(report["measurements"]) == 4


@pytest.mark.parametrize(("call", "more"), [(1, []), (4, ["--openings", str(LEAST_OPENINGS)])])
def test_nothing_is_written_where_nothing_can_be_said(
    bert_artifact: Path, tmp_path: Path, stop_at: Any, call: int, more: list[str]
) -> None:
    stop_at(serve.bench.openings, "measure_in_turn", call)
    code, out = _bench([bert_artifact], tmp_path / "r", *more)
    assert (code, out) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_report_lacks_nothing(bert_artifact: Path, tmp_path: Path) -> None:
    code, out = _bench([bert_artifact], tmp_path / "r")
    assert code == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["unmeasured"] == []
    assert "Interrupted" not in out
