"""The examples run as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

from pst.files import read_json
from pst.patterns import parse_pattern
from tests.command_line import done

ROOT = Path(__file__).resolve().parents[1]


def test_trainer_callback(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    script = ROOT / "examples" / "trainer_callback.py"
    arguments = ["--model", str(tiny_bert), "--data", str(reviews_file), "--output", str(tmp_path / "sparse")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, str(script), *arguments, "--epochs", "2"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    report = read_json(tmp_path / "sparse" / "sparsity.json", AssertionError, "")  # type: ignore[arg-type]
    assert len(report["weights"]) == 12
    for row in report["weights"]:
        weight = model.get_parameter(row["name"]).detach().numpy()
        assert parse_pattern("2:4").holds(weight, axis=row["axis"])
        assert row["density"] == 0.5
    done("export", tmp_path / "sparse", "--output", tmp_path / "artifact")
    assert (tmp_path / "artifact" / "model.onnx").is_file()
