"""Evaluation of every stage, against transformers and onnxruntime used directly."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.data import DataSpec
from pst.errors import ArtifactError, ConfigError, DataError, ModelError
from serve.classify import Classifier, softmax
from serve.describe import describe, max_positions
from serve.evaluate import evaluate

TOLERANCE = 1e-4


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain_logits(artifact: Path, texts: list[str]) -> np.ndarray:
    """What a stranger would write: an InferenceSession, the artifact's tokenizer, and none of this package."""
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    encoded = tokenizer(texts, truncation=True, padding=True, return_tensors="np")
    (logits,) = session.run(["logits"], {name: value for name, value in encoded.items() if name in names})
    return np.asarray(logits)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_artifact_agrees_with_plain_onnxruntime_row_by_row(
    tmp_path: Path, bert_artifact: Path, reviews_file: Path, batch_size: int
) -> None:
    rows = rows_of(reviews_file)
    logits = plain_logits(bert_artifact, [str(row["sentence"]) for row in rows])
    written = tmp_path / "predictions.jsonl"
    result = evaluate(bert_artifact, DataSpec(data=str(reviews_file)), batch_size=batch_size, predictions=written)
    answers = rows_of(written)
    assert [row["label"] for row in answers] == [row["label"] for row in rows]
    assert [row["prediction"] for row in answers] == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose([row["scores"] for row in answers], softmax(logits), atol=TOLERANCE)
    labels = np.array([row["label"] for row in rows])
    assert result.value == result.metrics["accuracy"] == np.mean(logits.argmax(axis=1) == labels)
    assert result.rows == len(rows)
    assert result.engine.startswith("onnxruntime-")


def test_model_and_artifact_agree(tmp_path: Path, bert_artifact: Path, tiny_bert: Path, reviews_file: Path) -> None:
    spec = DataSpec(data=str(reviews_file))
    run = tmp_path / "run"
    shutil.copytree(tiny_bert, run / "model")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("artifact", "model", "run")}
    results = [
        evaluate(path, spec, predictions=files[name])
        for name, path in (("artifact", bert_artifact), ("model", tiny_bert), ("run", run))
    ]
    assert [result.engine.partition("-")[0] for result in results] == ["onnxruntime", "torch", "torch"]
    scores = {name: np.array([row["scores"] for row in rows_of(file)]) for name, file in files.items()}
    np.testing.assert_allclose(scores["artifact"], scores["model"], atol=TOLERANCE)
    np.testing.assert_array_equal(scores["run"], scores["model"])
    assert results[0].metrics == results[1].metrics == results[2].metrics
    assert results[0].fingerprint == results[1].fingerprint


def test_gpt2(gpt2_artifact: Path, tiny_gpt2: Path, reviews_file: Path) -> None:
    spec = DataSpec(data=str(reviews_file))
    assert evaluate(gpt2_artifact, spec).metrics == evaluate(tiny_gpt2, spec, engine="torch-cpu").metrics


def test_pairs_and_regression(tmp_path: Path, tiny_bert: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(tiny_bert, num_labels=1, problem_type="regression")
    torch.manual_seed(1)
    model = BertForSequenceClassification(config).eval()
    folder = tmp_path / "scorer"
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(folder)
    first, second = ["the film", "a lovely story of war", "dull plot"], ["a story", "the film", "very tedious scene ."]
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"sentence1": a, "sentence2": b, "label": 0.5 + i} for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with torch.no_grad():
        expected = model(**tokenizer(first, second, padding=True, return_tensors="pt")).logits[:, 0].numpy()
    written = tmp_path / "predictions.jsonl"
    result = evaluate(folder, DataSpec(data=str(data)), predictions=written)
    answers = rows_of(written)
    np.testing.assert_allclose([row["prediction"] for row in answers], expected, atol=TOLERANCE)
    assert [row["scores"] for row in answers] == [[], [], []]
    assert result.metric == "pearson"
    assert result.value == pytest.approx(np.corrcoef(expected, [0.5, 1.5, 2.5])[0, 1], abs=1e-4)
    with Classifier(folder) as classifier:
        (answer,) = classifier.predict(first[:1], second[:1])
    assert answer.to_json() == {"value": pytest.approx(float(expected[0]), abs=TOLERANCE)}

    from export.pipeline import export

    export(folder, tmp_path / "artifact")
    exported = evaluate(tmp_path / "artifact", DataSpec(data=str(data)))
    assert exported.task == "regression"
    assert exported.value == pytest.approx(result.value, abs=1e-4)


def test_result_as_json_and_as_text(bert_artifact: Path, reviews_file: Path) -> None:
    result = evaluate(bert_artifact, DataSpec(data=str(reviews_file), limit=10))
    content = json.loads(json.dumps(result.to_json()))
    assert content["value"] == content["metrics"][content["metric"]]
    assert content["rows"] == 10
    assert content["max_length"] == 64
    text = result.render()
    assert "accuracy" in text
    assert f"{result.value:.4f}" in text


def test_string_labels_go_through_the_models_names(tmp_path: Path, bert_artifact: Path) -> None:
    data = tmp_path / "named.jsonl"
    rows = [{"text": "lovely film", "label": "POSITIVE"}, {"text": "dull film", "label": "NEGATIVE"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = tmp_path / "predictions.jsonl"
    evaluate(bert_artifact, DataSpec(data=str(data)), predictions=written)
    assert [row["label"] for row in rows_of(written)] == [1, 0]


def test_user_errors(tmp_path: Path, bert_artifact: Path, reviews_file: Path) -> None:
    spec = DataSpec(data=str(reviews_file))
    with pytest.raises(ArtifactError, match="does not exist"):
        evaluate(tmp_path / "nowhere", spec)
    with pytest.raises(ArtifactError, match="is a file"):
        evaluate(bert_artifact / "model.onnx", spec)
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        evaluate(tmp_path, spec)
    with pytest.raises(ConfigError, match="batch of 0"):
        evaluate(bert_artifact, spec, batch_size=0)
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": "film", "label": label}) + "\n" for label in range(5)))
    with pytest.raises(DataError, match="more labels"):
        evaluate(bert_artifact, DataSpec(data=str(many)))


def test_damaged_artifact_is_found_by_its_hash(tmp_path: Path, bert_artifact: Path, reviews_file: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(bert_artifact, folder)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or was changed"):
        evaluate(folder, DataSpec(data=str(reviews_file)))
    (folder / "model.onnx").unlink()
    with pytest.raises(ModelError, match=r"neither model\.onnx nor"):
        describe(folder)


def test_describe(tmp_path: Path, bert_artifact: Path, sparse_artifact: Path, tiny_bert: Path) -> None:
    artifact, sparse, model = describe(bert_artifact), describe(sparse_artifact), describe(tiny_bert)
    assert (artifact.kind, model.kind) == ("artifact", "model")
    assert artifact.labels == model.labels == ("NEGATIVE", "POSITIVE")
    assert artifact.max_length == model.max_length == 64
    assert (sparse.pattern, artifact.pattern) == ("2:4", "dense")
    assert sparse.sparsity == pytest.approx(0.5)
    assert artifact.size_bytes == (bert_artifact / "model.onnx").stat().st_size
    # What another tool exported has no export.json: config.json and the tokenizer say enough.
    foreign = tmp_path / "foreign"
    shutil.copytree(bert_artifact, foreign)
    (foreign / "export.json").unlink()
    bare = describe(foreign)
    assert (bare.pattern, bare.sparsity, bare.labels, bare.max_length) == (None, None, model.labels, 64)


def test_max_positions(tmp_path: Path) -> None:
    def limit(**config: object) -> int | None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return max_positions(tmp_path)

    assert limit(model_type="bert", max_position_embeddings=512) == 512
    assert limit(model_type="gpt2", n_positions=1024) == 1024
    assert limit(model_type="roberta", max_position_embeddings=514, pad_token_id=1) == 512
    assert limit(model_type="t5") is None


def test_softmax_is_exact_for_large_logits() -> None:
    np.testing.assert_array_equal(softmax(np.array([[1e4, 1e4], [0.0, 1e4]], np.float32)), [[0.5, 0.5], [0.0, 1.0]])
    assert softmax(np.zeros((2, 3), np.float32)).dtype == np.float64
