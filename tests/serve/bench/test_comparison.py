"""Two reports side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.errors import ConfigError, RunError
from serve.bench.comparison import compare_reports
from serve.bench.html import page
from serve.bench.runner import bench


def write(path: Path, samples: dict[tuple[str, str], list[float]], **environment: Any) -> Path:
    machine = {"cpu": "A", "threads": 2, "gpus": [], "versions": {"onnxruntime": "1.0"}, **environment}
    entries = [{"artifact": a, "workload": w, "latency": {"samples": found}} for (a, w), found in samples.items()]
    path.write_text(json.dumps({"schema_version": 1, "environment": machine, "measurements": entries}))
    return path


def test_a_report_of_the_first_schema_is_read(tmp_path: Path, bert_artifact: Path) -> None:
    """benchmarks/ holds some; what the second added is not needed to compare them."""
    bench([bert_artifact], shapes=[(1, 4)], output=tmp_path / "new", threads=1, warmup=1, runs=6, receipt=False)
    report = json.loads((tmp_path / "new" / "report.json").read_text(encoding="utf-8"))
    old = report | {"schema_version": 1}
    for added in ("stopped", "notes", "process_peak_bytes"):
        del old[added]
    for artifact in old["artifacts"]:
        del artifact["memory"], artifact["plan_bytes"]
    for entry in old["measurements"]:
        del entry["energy"], entry["latency"]["first"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    found = compare_reports(tmp_path / "old.json", tmp_path / "new")
    assert [row.speedup.ratio for row in found.rows] == [1.0]
    assert "bert" in page(old, machine=[])


def noisy(center: float, *, count: int = 60) -> list[float]:
    return [float(value) for value in center * np.exp(0.01 * np.random.default_rng(int(center)).standard_normal(count))]


def test_ratios_and_what_differs(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {("m", "1x32"): noisy(20), ("m", "8x32"): noisy(90), ("x", "1x32"): noisy(5)})
    second = write(
        tmp_path / "b.json",
        {("m", "1x32"): noisy(10), ("m", "8x32"): [90 / 91 * value for value in noisy(91)]},
        threads=4,
        versions={"onnxruntime": "2.0"},
    )
    found = compare_reports(first, second)
    faster, same = found.rows
    assert (faster.artifact, faster.workload) == ("m", "1x32")
    assert faster.speedup.ratio == pytest.approx(2, rel=0.01)
    assert faster.speedup.low is not None
    assert faster.speedup.high is not None
    assert faster.speedup.low < faster.speedup.ratio < faster.speedup.high
    assert faster.speedup.finding == "faster"
    assert same.speedup.finding == "same"
    assert found.differences == ("threads: 2, then 4", "onnxruntime: 1.0, then 2.0")
    assert found.alone == ("x at 1x32 (first)",)
    text = found.render()
    assert "| 1x32 | m | " in text
    assert "Only in one of them: x at 1x32 (first)" in text
    assert found.to_json()["rows"][0]["speedup"]["finding"] == "faster"


def test_the_interval_covers_the_ratio_of_the_medians(tmp_path: Path) -> None:
    """In 200 pairs of runs of a known ratio, at least the promised 95%, within chance."""
    random, inside = np.random.default_rng(0), 0
    for _ in range(200):
        one, other = (center * np.exp(0.1 * random.standard_normal(30)) for center in (3.0, 2.0))
        first = write(tmp_path / "a.json", {("m", "w"): one.tolist()})
        second = write(tmp_path / "b.json", {("m", "w"): other.tolist()})
        speedup = compare_reports(first, second).rows[0].speedup
        assert speedup.low is not None
        assert speedup.high is not None
        inside += speedup.low <= 1.5 <= speedup.high
    assert inside >= 184  # below which 95% would not fall once in a thousand times


def test_too_few_rounds_have_no_interval(tmp_path: Path) -> None:
    files = [write(tmp_path / name, {("m", "w"): [1.0, 2.0]}) for name in ("a.json", "b.json")]
    row = compare_reports(*files).rows[0]
    assert row.speedup.finding == "undecided"
    assert "too few rounds" in compare_reports(*files).render()
    assert "Machine and versions are the same." in compare_reports(*files).render()


def test_a_real_report_against_itself(bert_artifact: Path, tmp_path: Path) -> None:
    bench([bert_artifact], shapes=[(1, 4)], output=tmp_path / "r", threads=1, warmup=1, runs=12, receipt=False)
    found = compare_reports(tmp_path / "r", tmp_path / "r" / "report.json")
    assert [(row.workload, row.speedup.ratio) for row in found.rows] == [("1x4", 1.0)]
    assert found.differences == ()


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", {("m", "w"): [1.0]})
    (tmp_path / "other.json").write_text('{"schema_version": 1}')
    (tmp_path / "newer.json").write_text('{"schema_version": 9, "measurements": []}')
    with pytest.raises(RunError, match=r"is not a report of pst bench; give the report\.json"):
        compare_reports(good, tmp_path / "other.json")
    with pytest.raises(RunError, match="schema version 9, this program reads up to 2; update it"):
        compare_reports(tmp_path / "newer.json", good)
    with pytest.raises(RunError, match=r"give the report\.json"):
        compare_reports(good, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no artifact and shape in common"):
        compare_reports(good, write(tmp_path / "b.json", {("other", "w"): [1.0]}))
