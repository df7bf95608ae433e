"""The metric in export.json against pst eval, and unlabelled text in place of rows with labels."""

import json
from pathlib import Path

import pytest

from export.accuracy import has_metric
from export.manifest import Manifest
from export.pipeline import export
from export.real_inputs import Texts, calibration_texts, real_inputs
from export.source import load_source
from pst.data import DataSpec, in_validation
from pst.errors import DataError, NoLabelsError
from serve.evaluate import evaluate

from ..encoders import make_encoder


def test_as_pst_eval_measures_it(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    spec = DataSpec(data=str(reviews_file))
    manifest = export(tiny_bert, tmp_path / "out", examples=real_inputs(tiny_bert, spec), data=spec.data)
    found = Manifest.load(tmp_path / "out").accuracy
    assert found is not None
    assert found == manifest.accuracy
    in_pytorch, of_artifact = evaluate(tiny_bert, spec), evaluate(tmp_path / "out", spec)
    assert (found.metric, found.rows) == ("accuracy", 64)
    assert (found.pytorch, found.artifact) == (in_pytorch.value, of_artifact.value)
    assert 0 < found.artifact < 1


def test_without_data_nothing_is_measured(tiny_bert: Path, tmp_path: Path) -> None:
    assert export(tiny_bert, tmp_path / "out").accuracy is None
    assert json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))["accuracy"] is None


def write(path: Path, *columns: str, rows: int = 40) -> DataSpec:
    lines = [json.dumps({name: f"{name} {row} ." for name in columns}) for row in range(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataSpec(data=str(path))


def test_unlabelled_text_will_do(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(tmp_path / "rows.jsonl", "text", "film")
    found = real_inputs(tiny_bert, spec)
    assert isinstance(found, Texts)
    assert (len(found), found.first[3], found.second) == (40, "text 3 .", None)
    assert "no metric is measured" in capsys.readouterr().err
    assert not has_metric(load_source(tiny_bert), found)
    with pytest.raises(NoLabelsError, match="no column with a usual name for labels"):
        raise_labels(spec)
    with pytest.raises(DataError, match="Column 'label' is not in"):
        real_inputs(tiny_bert, DataSpec(data=spec.data, label_column="label"))
    (tmp_path / "rows.txt").write_text("the film is lovely .\n\na dull plot !\n", encoding="utf-8")
    lines = real_inputs(tiny_bert, DataSpec(data=str(tmp_path / "rows.txt")))
    assert isinstance(lines, Texts)
    assert lines.first == ["the film is lovely .", "a dull plot !"]


def raise_labels(spec: DataSpec) -> None:
    from pst.data import load_whole

    load_whole(spec)


@pytest.mark.parametrize("head", ["token_classification", "question_answering"])
def test_heads_without_a_metric_need_no_label(head: str, tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "model", "distilbert", head)
    spec = write(tmp_path / "rows.jsonl", "question", "passage", "label")
    found = real_inputs(folder, spec)
    assert isinstance(found, Texts)
    assert found.second is not None
    manifest = export(folder, tmp_path / "out", examples=found, data=spec.data)
    assert manifest.accuracy is None
    assert [case["rows"] for case in manifest.parity.cases if case["name"] == "real"] == [40]


def test_calibration_takes_training_rows(tiny_bert: Path, tmp_path: Path) -> None:
    spec = write(tmp_path / "rows.jsonl", "text", rows=200)
    texts = calibration_texts(tiny_bert, spec)
    assert texts.first == [f"text {row} ." for row in range(200) if not in_validation(f"text {row} .", 0.1)]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", "text", rows=7)
    write(tmp_path / "folder" / "validation.jsonl", "text", rows=5)
    split = DataSpec(data=str(tmp_path / "folder"))
    assert len(calibration_texts(tiny_bert, split)) == 7
    held_out = real_inputs(tiny_bert, split)
    assert held_out is not None
    assert len(held_out) == 5
    rows = [json.dumps({"text": ["a", "list"]})] * 3
    (tmp_path / "lists.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match="holds values that are no text"):
        calibration_texts(tiny_bert, DataSpec(data=str(tmp_path / "lists.jsonl")))
