"""The table over several data sets: real comparisons of a tiny BERT, and what is said of given numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.accuracy_report import build, markdown, text
from pst.errors import ConfigError, RunError
from tests.conftest import write_reviews

STEPS = ["steps=2", "batch_size=8", "device=cpu", "max_length=16"]
SEEDS = (0, 1, 2)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders called cola and mrpc, with made-up reviews in both."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("cola", "mrpc")):
        (root / name).mkdir()
        write_reviews(root / name / "train.jsonl", rows=16, seed=number)
        write_reviews(root / name / "validation.jsonl", rows=24, seed=number + 9)
    return [root / "cola", root / "mrpc"]


def arguments_for(model: Path, data: list[Path], output: Path, *more: str) -> list[str]:
    start = ["--model", str(model), "--data", *map(str, data), "--output", str(output)]
    return [*start, "--report", str(output / "table.json"), "--set", *STEPS, *more]


def test_two_data_sets_at_once_then_kept(
    tiny_bert: Path, data_sets: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--seeds", "2", "--methods", "dense", "magnitude", "pst", "--sparsities", "0.5", "--patterns"]
    grid += ["unstructured", "--set-for", "mrpc", "steps=3", "--set", "magnitude.lr=1e30", "pst.calibration=8"]
    arguments = arguments_for(tiny_bert, data_sets, tmp_path, "--datasets-at-once", "2", *grid)
    assert accuracy.main(arguments) == tmp_path / "table.json"
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "table.json").read_text())
    assert {name: one["metric"] for name, one in report["datasets"].items()} == {"cola": "matthews", "mrpc": "f1"}
    assert {name: one["cells"][0]["steps"] for name, one in report["datasets"].items()} == {"cola": 2, "mrpc": 3}
    dense, magnitude, pst = report["rows"]
    assert [row["method"] for row in report["rows"]] == ["dense", "magnitude", "pst"]

    def stored(data: str, run: str, metric: str) -> float:
        found = json.loads((tmp_path / data / "runs" / run / "model" / "sparsity.json").read_text())
        return 100 * float(found["metrics"][metric])

    differences = []
    for seed in (0, 1):
        cola, mrpc = (
            [stored(data, f"{run}_seed{seed}", metric) for run in ("dense", "pst_unstructured_0.5")]
            for data, metric in (("cola", "matthews"), ("mrpc", "f1"))
        )
        assert pst["datasets"]["cola"]["by_seed"][str(seed)] == pytest.approx(cola[1])
        assert pst["mean"]["by_seed"][str(seed)] == pytest.approx((cola[1] + mrpc[1]) / 2)
        differences.append((cola[1] + mrpc[1] - cola[0] - mrpc[0]) / 2)
    assert pst["mean"]["to_dense"]["mean"] == pytest.approx(sum(differences) / 2)
    assert pst["datasets"]["cola"]["step_ms"] > 0
    for entry in magnitude["datasets"].values():  # it diverged, and stays in the table
        assert (entry["value"], entry["failed"]) == (None, 2)
    assert magnitude["mean"]["value"] is None
    row = next(line for line in printed.splitlines() if line.startswith("magnitude"))
    assert row.split()[-3:] == ["failed"] * 3
    assert "cola: Failed: magnitude, unstructured 50%, seed 0: Training diverged" in printed
    assert dense["mean"]["to_dense"] is None
    assert "| magnitude | unstructured 50% | failed | failed | failed |" in (tmp_path / "table.md").read_text()

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(written) == 8
    rows = report["rows"]
    accuracy.main(["--output", str(tmp_path), "--report", str(tmp_path / "again.json"), "--report-only"])
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == rows
    only = ["--output", str(tmp_path), "--report", str(tmp_path / "again.json"), "--report-only", "--data", "mrpc"]
    accuracy.main([*only, "--metric", "mrpc=accuracy"])
    again = json.loads((tmp_path / "again.json").read_text())
    assert {name: one["metric"] for name, one in again["datasets"].items()} == {"mrpc": "accuracy"}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written


def test_one_that_fails_as_a_whole_is_named_and_the_others_are_kept(
    tiny_bert: Path, data_sets: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    absent = data_sets[0].parent / "absent"
    dense = ["--methods", "dense", "--seeds", "1"]
    with pytest.raises(RunError, match="failed for absent; why stands above"):
        accuracy.main(arguments_for(tiny_bert, [absent, data_sets[1]], tmp_path, *dense))
    assert "Error: " in capfd.readouterr().err
    assert (tmp_path / "mrpc" / "report.json").is_file()
    assert not (tmp_path / "table.json").exists()


def test_a_signal_stops_the_runs_as_well(tiny_bert: Path, data_sets: list[Path], tmp_path: Path) -> None:
    endless = ["--methods", "dense", "--seeds", "1", "--set", "steps=1000000", "checkpoint_every=0"]
    arguments = arguments_for(tiny_bert, data_sets[:1], tmp_path, *endless)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.accuracy", *arguments], stderr=subprocess.PIPE)
    run = tmp_path / "cola" / "runs" / "dense_seed0"
    deadline = time.monotonic() + 60
    while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode
    assert "Stopped with 0 of 1 runs finished" in said
    assert list((run / "checkpoints").glob("*.pt"))


def test_data_sets_share_the_gpus_round_robin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("OMP_NUM_THREADS")
    shares = [accuracy._share_of_the_machine(slot, slots=3, jobs=10_000) for slot in range(3)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,7", "5", "6"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    shares = [accuracy._share_of_the_machine(slot, slots=3, jobs=1) for slot in range(3)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "0"]


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", "m", "--output", str(tmp_path)]
    with pytest.raises(ConfigError, match="two of one name would share a folder"):
        accuracy.main([*given, "--data", "a/cola", "b/cola"])
    with pytest.raises(ConfigError, match="--set-for sst2 is not among the data sets cola"):
        accuracy.main([*given, "--data", "a/cola", "--set-for", "sst2", "steps=3"])
    with pytest.raises(RunError, match="holds no finished comparison"):
        accuracy.main(["--output", str(tmp_path), "--report-only"])
    with pytest.raises(SystemExit):
        accuracy.main(given)
    assert "--model and --data are needed" in capsys.readouterr().err


# -- what is said of given numbers -----------------------------------------------------------------------------------

SHAPES = {"unstructured": 0.5, "2:4": 0.5}


def cell(method: str, pattern: str, seed: int, value: float | None) -> dict[str, Any]:
    metrics = {} if value is None else {"accuracy": value, "loss": 0.1}
    return {
        "name": f"{method}{pattern}{seed}", "method": method, "pattern": pattern, "seed": seed, "metrics": metrics,
        "sparsity": SHAPES.get(pattern, 0.0), "error": "It broke." if value is None else None, "steps": 10,
        "measured_sparsity": 0.5, "train_seconds": 2.0, "peak_memory_bytes": 5, "trainable_parameters": 7,
    }  # fmt: skip


def comparison(values: dict[tuple[str, str], list[float | None]], *, model: str = "m") -> dict[str, Any]:
    """A report with these values, seeds 0, 1, 2, by method and pattern."""
    cells = [
        cell(method, pattern, seed, value)
        for (method, pattern), found in values.items()
        for seed, value in zip(SEEDS, found, strict=True)
    ]
    options = dict.fromkeys(("methods", "patterns", "sparsities", "seeds", "from_dense", "teacher_from_dense"), 1)
    machine = {"command": "c", "cpu": "p", "gpus": [], "time": "t", "versions": {"torch": "2"}}
    notes = [f"Failed: {one['name']}: {one['error']}" for one in cells if one["error"]]
    options |= {"model": model}  # type: ignore[dict-item]
    return {"metric": "accuracy", "options": options, "environment": machine, "notes": notes, "cells": cells}


DENSE = ("dense", "dense")
FIRST: dict[tuple[str, str], list[float | None]] = {
    DENSE: [0.80, 0.82, 0.84],
    ("pst", "unstructured"): [0.80, 0.81, 0.83],
    ("magnitude", "unstructured"): [0.79, 0.80, 0.83],
    ("pst", "2:4"): [0.70, None, 0.80],
}
SECOND: dict[tuple[str, str], list[float | None]] = {
    DENSE: [0.60, 0.60, 0.60],
    ("pst", "unstructured"): [0.60, 0.59, 0.61],
    ("magnitude", "unstructured"): [0.58, 0.59, 0.59],
    ("pst", "2:4"): [0.60, 0.60, 0.60],
}


def test_means_pair_the_seeds_that_all_data_sets_have() -> None:
    content = build({"one": comparison(FIRST), "two": comparison(SECOND)}, metrics={}, environment={})
    rows = {(row["method"], row["pattern"]): row for row in content["rows"]}
    assert list(rows) == [DENSE, ("pst", "unstructured"), ("magnitude", "unstructured"), ("pst", "2:4")]
    mean = rows["pst", "unstructured"]["mean"]
    assert mean["by_seed"] == pytest.approx({"0": 70, "1": 70, "2": 72})
    assert mean["to_dense"]["mean"] == pytest.approx((0 - 1 + 0) / 3)
    assert mean["to_dense"]["error"] == pytest.approx(1 / 3)
    broken = rows["pst", "2:4"]
    assert broken["datasets"]["one"]["failed"] == 1
    assert broken["datasets"]["one"]["value"]["n"] == 2
    assert broken["mean"]["by_seed"] == pytest.approx({"0": 65, "2": 70})
    assert broken["mean"]["to_dense"]["n"] == 2
    assert broken["datasets"]["one"]["step_ms"] == pytest.approx(200)
    assert content["notes"] == ["one: Failed: pst2:41: It broke."]


def test_goals_and_verdicts() -> None:
    content = build({"one": comparison(FIRST), "two": comparison(SECOND)}, metrics={}, environment={})
    assert [(goal["verdict"], goal["text"]) for goal in content["goals"]] == [
        ("met", "pst, unstructured 50%: -0.33 ± 0.33 to dense, at most 0.5 below"),
        ("met", "pst, unstructured 50%: +1.00 to magnitude, best of all methods"),
        ("not met", "pst, 2:4 50%: -3.50 ± 1.50 to dense, at most 1 below"),
        ("not measured", "pst, 2:4 50%: -, best of all methods"),
    ]
    first, second = content["verdicts"]
    said = "unstructured, 50%: pst is best with 70.67, +1.00 ± 0.29 to magnitude, the next (3 seeds)"
    assert first == f"{said}: more than two standard errors."
    assert second == "2:4, 50%: pst is best with 67.50, the only one with a value."
    shown = text(content)
    assert "75.00 ± 7.07 (2, 1 failed)" in shown
    for part in (*(goal["text"] for goal in content["goals"]), *content["verdicts"], *content["notes"]):
        assert part in shown
        assert part in markdown(content)


def test_what_no_table_can_hold() -> None:
    report = comparison(FIRST)
    with pytest.raises(ConfigError, match="loss is better when lower"):
        build({"one": report}, metrics={"one": "loss"}, environment={})
    with pytest.raises(ConfigError, match="the runs have no f1, but accuracy, loss"):
        build({"one": report}, metrics={"one": "f1"}, environment={})
    with pytest.raises(ConfigError, match="--metric names two; the data sets are one"):
        build({"one": report}, metrics={"two": "f1"}, environment={})
    without = comparison({key: values for key, values in FIRST.items() if key != DENSE})
    with pytest.raises(RunError, match="has the method dense"):
        build({"one": without}, metrics={}, environment={})


def test_different_options_are_said_and_what_holds_for_all_is_said_once() -> None:
    one, two = comparison(FIRST), comparison(SECOND, model="n")
    for report in (one, two):
        report["notes"].append("All had a teacher.")
    content = build({"one": one, "two": two}, metrics={}, environment={})
    failed = "one: Failed: pst2:41: It broke."
    assert content["notes"] == ["The comparisons differ in model: one m, two n.", "All had a teacher.", failed]
