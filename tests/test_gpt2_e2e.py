"""The E2E benchmark, on twelve rows and a model of a few thousand weights: what it runs, prints, writes, and keeps."""

import json
from pathlib import Path

import pytest

from benchmarks import gpt2_e2e
from tests.pst.tasks.conftest import fact_rows, write_rows

SIZES = {"layers": 1, "width": 16, "heads": 2, "vocabulary": 280, "positions": 72, "seed": 1}


def test_dense_from_nothing_then_sparse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "validation", "test"):
        write_rows(tmp_path / f"{split}.jsonl", fact_rows()[: 4 if split == "test" else 12])
    arguments = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--report", str(tmp_path / "report.json")]
    arguments += [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    arguments += ["--dense-epochs", "2", "--sparse-epochs", "1", "--device", "cpu", "--distil"]
    arguments += ["--set", "batch_size=6", "num_beams=2", "max_new_tokens=6", "--sparse-set", "r1=2", "r2=2"]
    assert gpt2_e2e.main(arguments) == tmp_path / "report.json"
    printed = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["results"]
    assert report["model"] == SIZES
    assert report["environment"]["command"].startswith("python -m benchmarks.gpt2_e2e --data")
    assert [row["name"] for row in rows] == ["dense", "dense_longer", "pst_0.5", "pst_0.9"]
    assert [row["steps"] for row in rows] == [4, 2, 2, 2]
    assert [line.split()[0] for line in printed[1:5]] == [row["name"] for row in rows]
    assert [row["sparsity"]["measured"] for row in rows] == pytest.approx([0, 0, 0.5, 0.9], abs=1e-3)
    dense = str(tmp_path / "out" / "dense" / "model")
    assert [row["config"]["model"] == dense for row in rows] == [False, True, True, True]
    assert [row["config"]["teacher"] for row in rows] == ["", "", dense, dense]
    assert {row["config"]["max_length"] for row in rows} == {72}
    for row in rows:
        assert 0 <= row["bleu_validation"] <= 100
        assert 0 <= row["bleu_test"] <= 100
        assert row["test"]["prompts"] == len(row["samples"]) == 2
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    gpt2_e2e.main(arguments)  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == written
    assert json.loads((tmp_path / "report.json").read_text())["results"] == rows
