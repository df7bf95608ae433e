"""A real grid end to end: its runs, its report, and what is kept when it is started again."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.compare import Report
from pst.errors import ConfigError, DataError, ModelError, PatternError, RunError
from tests.command_line import pst
from tests.pst.compare.grids import run_files, run_grid
from tests.pst.training import report as run_report
from tests.pst.training import tensors

PRUNED = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def grid(tiny_bert: Path, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    output = tmp_path_factory.mktemp("compare") / "grid"
    return output, run_grid(tiny_bert, reviews_file, output)


def content(output: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((output / "report.json").read_text())
    return value


def test_every_cell_is_a_run_folder_of_its_own(grid: tuple[Path, Report]) -> None:
    output, _ = grid
    runs = sorted(path.name for path in (output / "runs").iterdir())
    shapes = [f"{method}_{shape}_0.5" for method in ("magnitude", "pst") for shape in ("2-4", "unstructured")]
    assert runs == sorted(f"{name}_seed{seed}" for name in ("dense", *shapes) for seed in range(2))
    kept = tensors(output / "runs" / "pst_2-4_0.5_seed1" / "model")[PRUNED].reshape(32, -1, 4) != 0
    assert (kept.sum(-1) == 2).all()
    seeds = [run_report(output / "runs" / name)["seed"] for name in ("pst_2-4_0.5_seed0", "pst_2-4_0.5_seed1")]
    assert seeds == [0, 1]


def test_report_json_agrees_with_the_runs(grid: tuple[Path, Report]) -> None:
    output, _ = grid
    found = content(output)
    assert found["schema_version"] == 1
    assert found["metric"] == "accuracy"
    assert len(found["cells"]) == 10
    assert {"time", "command", "cpu", "gpus", "versions"} <= set(found["environment"])
    values: dict[tuple[str, str], list[float]] = {}
    for cell in found["cells"]:
        run = run_report(output / "runs" / cell["name"])
        assert cell["metrics"] == run["metrics"]
        assert (cell["train_seconds"], cell["steps"]) == (run["train_seconds"], 4)
        values.setdefault((cell["method"], cell["pattern"]), []).append(run["metrics"]["accuracy"])
    assert len(found["rows"]) == 5
    dense = np.array(values["dense", "dense"])
    for row in found["rows"]:
        expected = np.array(values[row["method"], row["pattern"]])
        assert (row["value"]["n"], row["failed"]) == (2, 0)
        assert row["value"]["mean"] == pytest.approx(expected.mean())
        assert row["value"]["std"] == pytest.approx(expected.std(ddof=1))
        if row["method"] == "dense":
            assert row["to_dense"] is None
            continue
        assert row["to_dense"]["mean"] == pytest.approx((expected - dense).mean())
        assert row["to_dense"]["error"] == pytest.approx((expected - dense).std(ddof=1) / np.sqrt(2))
        assert row["measured_sparsity"] == 0.5
        assert row["step_seconds"] > 0
        assert row["trainable_parameters"] > 0


def test_report_md_and_the_terminal_show_every_row_and_verdict(grid: tuple[Path, Report]) -> None:
    output, report = grid
    text = (output / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [line.split("|")[1].strip() for line in table[2:]] == ["dense", *["magnitude", "pst"] * 2]
    assert all("(n = 2)" in line for line in table[2:])
    shown = report.render()
    for sentence in report.verdicts():
        assert re.match(r"(unstructured|2:4), 50%: (pst|magnitude) (is best|and .* are equal) with 0\.", sentence)
        assert sentence in text
        assert sentence in shown
    assert len(report.verdicts()) == 2
    assert "plot.png" in text
    assert all(title in shown for title in ("method", "pattern", "ms/step", "peak GB", "trainable"))


def test_plots_are_pictures(grid: tuple[Path, Report]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plots")
    output, report = grid
    assert report.plots == ("plot.png", "plot.svg")
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")
    words = "".join(ElementTree.parse(output / "plot.svg").getroot().itertext())
    for word in ("accuracy", "sparsity", "dense", "magnitude", "pst", "unstructured", "N:M", "2:4", "50%"):
        assert word in words


def test_the_same_command_again_keeps_every_run(
    grid: tuple[Path, Report], tiny_bert: Path, reviews_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, report = grid
    before = run_files(output)
    again = run_grid(tiny_bert, reviews_file, output)
    assert run_files(output) == before
    assert [row.value for row in again.rows] == [row.value for row in report.rows]
    assert any(note.startswith("10 runs were kept") for note in again.notes)
    assert "step" not in capfd.readouterr().err


def test_other_options_for_a_finished_run_are_refused(
    grid: tuple[Path, Report], tiny_bert: Path, reviews_file: Path
) -> None:
    output, _ = grid
    before = run_files(output)
    with pytest.raises(RunError, match=r"pst_unstructured_0\.5_seed0 is from another configuration \(lr was") as error:
        run_grid(tiny_bert, reviews_file, output, sets=("pst.lr=0.5",))
    assert "delete the folder to train it again" in str(error.value)
    assert run_files(output) == before


def test_without_matplotlib_everything_else_is_there(
    grid: tuple[Path, Report], tiny_bert: Path, reviews_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, _ = grid
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = run_grid(tiny_bert, reviews_file, output)
    assert report.plots == ()
    assert any("matplotlib is not installed" in note for note in report.notes)
    assert not (output / "plot.png").exists()
    assert "plot.png" not in (output / "report.md").read_text()
    monkeypatch.undo()
    assert run_grid(tiny_bert, reviews_file, output).plots


def test_one_seed_and_a_run_that_diverges(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "grid"
    options: dict[str, Any] = {"methods": ("dense", "magnitude"), "patterns": ("2:4",), "seeds": 1}
    report = run_grid(tiny_bert, reviews_file, output, sets=("magnitude.lr=1e38", "max_grad_norm=0"), **options)
    dense, magnitude = report.rows
    assert dense.value is not None
    assert (dense.value.n, dense.value.std) == (1, None)
    assert (magnitude.value, magnitude.failed, magnitude.to_dense) == (None, 1, None)
    found = content(output)
    errors = {cell["name"]: cell["error"] for cell in found["cells"]}
    assert errors["dense_seed0"] is None
    assert "Training diverged" in errors["magnitude_2-4_0.5_seed0"]
    assert report.verdicts() == ["2:4, 50%: every run failed."]
    text = (output / "report.md").read_text()
    assert "(n = 1, no spread)" in text
    assert "Failed: magnitude, 2:4 50%, seed 0: Training diverged" in text


def test_a_method_without_a_result_is_an_error_beside_the_report(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    sets = ("magnitude.lr=1e38", "max_grad_norm=0", "steps=2", "batch_size=4", "max_length=16")
    outcome = pst(
        "compare", "--model", tiny_bert, "--data", reviews_file, "--methods", "dense,magnitude", "--patterns", "2:4",
        "--seeds", "1", "--output", tmp_path / "grid", *(f"--set={each}" for each in sets),
    )  # fmt: skip
    assert outcome.code == 2
    assert "2:4, 50%: every run failed." in outcome.out
    assert "Without a result, since every run failed: magnitude 2:4 50%." in outcome.err
    assert (tmp_path / "grid" / "report.md").is_file()


def test_nothing_but_failures_is_an_error(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Every run of the comparison failed; the first, dense, seed 0: Training div"):
        run_grid(
            tiny_bert, reviews_file, tmp_path / "grid", sets=("lr=1e38", "max_grad_norm=0"), methods=("dense",), seeds=1
        )


def test_sparse_runs_start_from_the_dense_run_and_learn_from_it(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "grid"
    report = run_grid(
        tiny_bert, reviews_file, output, methods=("magnitude", "dense"), patterns=("2:4",), seeds=1,
        from_dense=True, teacher_from_dense=True, sets=("magnitude.lr=0",),
    )  # fmt: skip
    folder = output / "runs" / "dense_seed0" / "model"
    sparse = output / "runs" / "magnitude_2-4_0.5_seed0"
    assert run_report(sparse)["config"]["model"] == run_report(sparse)["config"]["teacher"] == str(folder)
    dense, pruned = tensors(folder)[PRUNED], tensors(sparse / "model")[PRUNED]
    assert (pruned[pruned != 0] == dense[pruned != 0]).all()
    assert any("build on its 4 steps" in note for note in report.notes)


def test_the_report_says_whose_own_default_a_teacher_is(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    report = run_grid(
        tiny_bert, reviews_file, tmp_path / "grid", methods=("dense", "magnitude", "pst"), seeds=1, from_dense=True,
        patterns=("unstructured", "2:4"), sets=("steps=60", "dense.lr=0.01", "pst.calibration=0"),
    )  # fmt: skip
    notes = [note for note in report.notes if "teacher" in note]
    assert notes == ["Of these the dense start was the teacher, by their own defaults or as asked: pst 2:4."]


def test_what_needs_a_failed_dense_run_fails_with_it(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Every run"):
        run_grid(
            tiny_bert, reviews_file, tmp_path / "grid", methods=("dense", "pst"), seeds=1, from_dense=True,
            sets=("dense.lr=1e38", "max_grad_norm=0"),
        )  # fmt: skip
    assert not (tmp_path / "grid" / "runs" / "pst_2-4_0.5_seed0").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ("dense", "lottery")}, ConfigError, "Unknown method 'lottery'"),
        ({"jobs": 0}, ConfigError, "--jobs is 0"),
        ({"model": Path("no/such/model")}, ModelError, "no/such/model"),
        ({"data": Path("no/such.jsonl")}, DataError, "such.jsonl"),
        ({"patterns": ("unstructured", "2:5")}, PatternError, "which 5 does not divide"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    model, data = changes.pop("model", tiny_bert), changes.pop("data", reviews_file)
    with pytest.raises(error, match=message):
        run_grid(model, data, tmp_path / "grid", **changes)
    assert list((tmp_path / "grid").glob("runs/*")) == []


def test_a_folder_of_something_else_is_left_alone(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious").write_text("mine")
    with pytest.raises(RunError, match="holds something else than a comparison"):
        run_grid(tiny_bert, reviews_file, tmp_path, overwrite=True)
    assert (tmp_path / "runs" / "precious").read_text() == "mine"


def test_overwrite_trains_again_once_the_new_grid_is_known_to_run(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "grid"
    shape: dict[str, Any] = {"methods": ("dense",), "seeds": 1}
    run_grid(tiny_bert, reviews_file, output, **shape)
    before = run_files(output)
    with pytest.raises(DataError):
        run_grid(tiny_bert, tmp_path / "none.jsonl", output, overwrite=True, **shape)
    assert run_files(output) == before
    report = run_grid(tiny_bert, reviews_file, output, overwrite=True, sets=("lr=0.01",), **shape)
    assert run_report(output / "runs" / "dense_seed0")["config"]["lr"] == 0.01
    assert report.notes == ("No plot: there is no sparse run to show.",)


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, pst.compare; print({'torch', 'transformers', 'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
