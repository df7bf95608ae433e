"""A model from which heads and neurons were removed, through export, inspect, eval, bench and plain ONNX Runtime."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from export.inspect import inspect
from export.manifest import Manifest
from export.pipeline import export
from pst.data import DataSpec
from pst.files import write_json
from pst.patterns.structured import Structured
from pst.result import sparsity_of
from pst.sparsify import merge_, set_sparsity_, sparsify_
from pst.structured.storage import load_structured
from serve.bench.runner import bench
from serve.bench.workload import parse_shapes
from serve.evaluate import evaluate
from tests.decoders import make_decoder
from tests.pst.structured.models import make

Made = Callable[[str], tuple[Path, Path]]


def prune(folder: Path, auto_class: str) -> None:
    """Remove two fifths of the multiply-adds of the model in *folder*, in place."""
    model = getattr(transformers, auto_class).from_pretrained(folder)
    sparsify_(model, pattern=Structured(multiple=4))
    set_sparsity_(model, 0.4)
    merge_(model)
    model.save_pretrained(folder)
    write_json(folder / "sparsity.json", sparsity_of(model, method="pst", pattern="structured", requested=0.4))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made("bert")``: a tiny pruned classifier's folder, and its artifact. Read only."""
    found: dict[str, tuple[Path, Path]] = {}

    def get(model_type: str) -> tuple[Path, Path]:
        if model_type not in found:
            folder = make(tmp_path_factory.mktemp("structured") / "model", model_type)
            prune(folder, "AutoModelForSequenceClassification")
            export(folder, folder.parent / "artifact")
            found[model_type] = folder, folder.parent / "artifact"
        return found[model_type]

    return get


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "gpt2"])
def test_the_artifact_answers_as_the_model(made: Made, model_type: str) -> None:
    folder, artifact = made(model_type)
    manifest, model = Manifest.load(artifact), load_structured(folder)
    assert manifest.pattern == "structured"
    assert manifest.structured == model.config.structured
    assert 0.4 <= manifest.sparsity["measured"] < 0.6
    assert all(weight.density == 1 for weight in manifest.weights)
    assert len(manifest.weights) == len(json.loads((folder / "sparsity.json").read_text())["weights"])
    ids = np.array([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
    feeds = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (logits,) = session.run(["logits"], {name: feeds[name] for name in names})
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(feeds[name]) for name in names}).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_cache_has_the_heads_that_each_layer_has(tmp_path: Path, kind: str) -> None:
    folder = make_decoder(tmp_path / "model", kind)
    prune(folder, "AutoModelForCausalLM")
    manifest = export(folder, tmp_path / "artifact")
    layers = load_structured(folder, "AutoModelForCausalLM").config.structured["layers"]
    heads = {tensor.name: tensor.shape[1] for tensor in manifest.inputs if tensor.name.endswith(".key")}
    assert heads == {f"past_key_values.{at}.key": len(layer["heads"]) for at, layer in enumerate(layers)}
    assert min(heads.values()) == 1


@pytest.mark.parametrize("which", [0, 1], ids=["folder", "artifact"])
def test_inspect_says_what_is_left(made: Made, which: int) -> None:
    found = inspect(made("bert")[which])
    report = load_structured(made("bert")[0]).config.structured
    assert found.to_json()["structured"] == report
    text = found.render(terminal=False)
    for index, layer in enumerate(report["layers"]):
        assert f"layer {index:<3} {len(layer['heads']):>3} of 4 heads {layer['neurons']:>6} of 64 neurons" in text
    assert f"{report['macs']['kept']:,} of {report['macs']['dense']:,}" in text


def test_inspect_says_nothing_of_other_models(tiny_bert: Path) -> None:
    found = inspect(tiny_bert)
    assert found.structured is None
    assert "were removed" not in found.render(terminal=False)


def test_eval_and_bench_take_both(made: Made, reviews_file: Path, tmp_path: Path) -> None:
    folder, artifact = made("bert")
    data = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in reviews_file.read_text().splitlines()]
    words = ["NEGATIVE", "POSITIVE"]
    data.write_text("".join(json.dumps(row | {"label": words[row["label"]]}) + "\n" for row in rows))
    answers = [evaluate(path, DataSpec(data=str(data)), threads=1) for path in (folder, artifact)]
    assert answers[0].metrics == answers[1].metrics
    dense = make(tmp_path / "dense", "bert")
    export(dense, tmp_path / "artifact")
    report = bench(
        [tmp_path / "artifact", artifact], shapes=parse_shapes("1x8"), output=tmp_path / "report", runs=3, precision=0
    )
    assert [subject.pattern for subject in report.subjects] == ["dense", "structured"]
    assert "zeros" not in " ".join(report.verdicts())
