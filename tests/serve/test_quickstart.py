"""The quickstart's stages in turn, on the tiny model and made-up reviews: real commands, a real server."""

import json
from pathlib import Path

import pytest

from pst.errors import RunError
from serve import quickstart as module
from serve.quickstart import quickstart
from tests.conftest import write_reviews


@pytest.fixture
def _tiny(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path) -> tuple[int, int]:
        folder.mkdir(parents=True, exist_ok=True)
        write_reviews(folder / "train.jsonl", rows=200, seed=5)
        write_reviews(folder / "validation.jsonl", rows=50, seed=6)
        return 200, 50

    monkeypatch.setattr(module, "model_folder", lambda: tiny_bert)
    monkeypatch.setattr(module, "write_reviews", write)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


@pytest.mark.usefixtures("_tiny")
def test_quickstart_leaves_every_folder_and_a_true_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    closing = quickstart(tmp_path, fresh=False, sparsity=0.7, steps=20)
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    dense, sparse = report["artifacts"]
    for item in (dense, sparse):
        assert f"{item['accuracy']['value']:.1%}" in closing
        assert f"{item['size_bytes'] / 1e6:.1f} MB" in closing
    assert f"{sparse['sparsity']:.1%}" in closing
    assert sparse["sparsity"] == pytest.approx(0.7, abs=0.001)
    assert report["verdicts"][0] in closing
    assert str(tmp_path / "report" / "report.md") in closing
    assert "says the sparse model" in closing
    shown = capfd.readouterr().err
    assert [line.split()[2] for line in shown.splitlines() if line.startswith("$ pst")] == [
        "train", "train", "export", "export", "bench", "serve",
    ]  # fmt: skip


@pytest.mark.usefixtures("_tiny")
def test_a_failing_stage_stops_the_quickstart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="'pst train' failed with exit code 2"):
        quickstart(tmp_path, fresh=False, sparsity=1.5, steps=2)
    assert "outside [0, 1)" in capfd.readouterr().err
