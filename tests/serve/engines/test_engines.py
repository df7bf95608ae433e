"""Every engine that is installed, held to the same behaviour; PyTorch called directly is the oracle."""

import importlib.metadata
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.errors import ArtifactError, EngineError, ModelError
from serve.engines import Engine, TensorSpec, available_cpus, check_feeds, engine_names, open_engine

NAMES = ("onnxruntime", "torch-cpu")
Open = Callable[[], Engine]


def feeds_of(batch: int, length: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "input_ids": random.integers(5, 30, (batch, length), dtype=np.int64),
        "attention_mask": np.ones((batch, length), dtype=np.int64),
        "token_type_ids": random.integers(0, 2, (batch, length), dtype=np.int64),
    }


def oracle(folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return np.asarray(model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits)


@pytest.fixture(params=NAMES)
def opened(request: pytest.FixtureRequest, bert_artifact: Path, tiny_bert: Path) -> Open:
    folder = bert_artifact if request.param == "onnxruntime" else tiny_bert
    return lambda: open_engine(folder, engine=request.param, threads=1)


def test_specs(opened: Open) -> None:
    with opened() as engine:
        assert set(engine.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
        assert {spec.dtype for spec in engine.inputs.values()} == {"int64"}
        assert list(engine.outputs) == ["logits"]
        assert engine.outputs["logits"].dtype == "float32"
        assert engine.max_length == 64
        assert engine.threads == 1


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 64), (8, 16)])
def test_same_answers_at_every_shape(opened: Open, tiny_bert: Path, batch: int, length: int) -> None:
    feeds = feeds_of(batch, length)
    with opened() as engine:
        logits = engine.infer(feeds)["logits"]
    np.testing.assert_allclose(logits, oracle(tiny_bert, feeds), atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing(opened: Open) -> None:
    short, padded = feeds_of(1, 5), feeds_of(1, 9)
    padded = {name: np.concatenate([short[name], np.zeros((1, 4), np.int64)], axis=1) for name in padded}
    with opened() as engine:
        expected = engine.infer(short)["logits"]
        np.testing.assert_allclose(engine.infer(padded)["logits"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "takes the inputs .*input_ids"),
        ({"extra": np.zeros((2, 5), np.int64)}, "extra"),
        ({"input_ids": np.zeros((2, 5), np.int32)}, "array of int64, but is int32"),
        ({"input_ids": [[1, 2]]}, "array of int64, but is list"),
        ({"input_ids": np.zeros(5, np.int64)}, "2 dimensions"),
        ({"input_ids": np.zeros((2, 6), np.int64)}, "must agree"),
        ({"input_ids": np.zeros((0, 5), np.int64)}, "is empty"),
    ],
)
def test_wrong_feeds(opened: Open, change: dict[str, Any], message: str) -> None:
    feeds = {name: value for name, value in {**feeds_of(2, 5), **change}.items() if value is not None}
    with opened() as engine:
        with pytest.raises(EngineError, match=message):
            engine.infer(feeds)
        assert engine.infer(feeds_of(2, 5))["logits"].shape == (2, 2)  # still usable


def test_empty_batch_and_empty_sequence(opened: Open) -> None:
    with opened() as engine:
        for shape in ((0, 5), (2, 0)):
            with pytest.raises(EngineError, match="is empty"):
                engine.infer(feeds_of(*shape))


def test_too_long(opened: Open) -> None:
    with opened() as engine, pytest.raises(EngineError, match=r"65 tokens.*positions for 64; truncate"):
        engine.infer(feeds_of(1, 65))


def test_close_twice_and_reopen(opened: Open) -> None:
    feeds = feeds_of(2, 5)
    engine = opened()
    before = engine.infer(feeds)["logits"]
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.infer(feeds)
    with opened() as again:
        np.testing.assert_array_equal(again.infer(feeds)["logits"], before)


def test_two_at_once(opened: Open) -> None:
    with opened() as one, opened() as two:
        for seed in range(3):
            feeds = feeds_of(2, 5, seed=seed)
            np.testing.assert_array_equal(one.infer(feeds)["logits"], two.infer(feeds)["logits"])


def test_outputs_belong_to_the_caller(opened: Open) -> None:
    with opened() as engine:
        first = engine.infer(feeds_of(2, 5))["logits"]
        kept = first.copy()
        engine.infer(feeds_of(2, 5, seed=1))
        np.testing.assert_array_equal(first, kept)


def test_auto_chooses_by_what_the_folder_holds(bert_artifact: Path, tiny_bert: Path) -> None:
    for path, expected in (
        (bert_artifact, "onnxruntime-"),
        (bert_artifact / "model.onnx", "onnxruntime-"),
        (tiny_bert, "torch-"),
    ):
        with open_engine(path) as engine:
            assert engine.name.startswith(expected)
            assert engine.threads == available_cpus()


def test_gpt2_takes_no_token_types(gpt2_artifact: Path, tiny_gpt2: Path) -> None:
    feeds = {name: value for name, value in feeds_of(3, 6).items() if name != "token_type_ids"}
    with open_engine(gpt2_artifact, threads=1) as onnx, open_engine(tiny_gpt2, engine="torch-cpu", threads=1) as torch:
        assert set(onnx.inputs) == set(torch.inputs) == set(feeds)
        np.testing.assert_allclose(onnx.infer(feeds)["logits"], torch.infer(feeds)["logits"], atol=1e-5)


def test_engine_names() -> None:
    assert {"onnxruntime", "torch"} <= set(engine_names())


@pytest.mark.parametrize("name", ["nonsense", "onnxruntime-tpu", "torch-tpu"])
def test_unknown_engine(bert_artifact: Path, name: str) -> None:
    with pytest.raises(EngineError, match="is not an engine; choose"):
        open_engine(bert_artifact, engine=name)


def test_cuda_by_name_without_cuda(bert_artifact: Path, tiny_bert: Path) -> None:
    import onnxruntime
    import torch

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers() or torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(EngineError, match="no CUDA provider"):
        open_engine(bert_artifact, engine="onnxruntime-cuda")
    with pytest.raises(EngineError, match="no CUDA device"):
        open_engine(tiny_bert, engine="torch-cuda")


def test_missing_and_wrong_paths(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_engine(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_engine(tmp_path)
    with pytest.raises(ArtifactError, match=r"no model\.onnx"):
        open_engine(tiny_bert, engine="onnxruntime")
    with pytest.raises(EngineError, match="-1 threads"):
        open_engine(tiny_bert, threads=-1)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_corrupt_onnx(tmp_path: Path, bert_artifact: Path, damage: str) -> None:
    whole = (bert_artifact / "model.onnx").read_bytes()
    content = {"garbage": b"garbage" * 100, "truncated": whole[: len(whole) // 2], "empty": b""}[damage]
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"not a whole ONNX model.*export it again"):
        open_engine(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_external_data(tmp_path: Path, tiny_bert: Path, damage: str) -> None:
    from export.pipeline import export

    export(tiny_bert, tmp_path / "artifact", external_data=True)
    file = tmp_path / "artifact" / "model.onnx.data"
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="second file that is missing or damaged"):
        open_engine(tmp_path / "artifact")


def test_newer_opset_is_refused_in_one_sentence(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 999)]), tmp_path / "model.onnx")
    with pytest.raises(EngineError, match=r"refuses .*model\.onnx"):
        open_engine(tmp_path / "model.onnx")


def test_damaged_weights(tmp_path: Path, tiny_bert: Path) -> None:
    for file in tiny_bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="cannot be opened as a classifier"):
        open_engine(tmp_path, engine="torch")


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no trained classifier"):
        open_engine(tmp_path, engine="torch")


def test_missing_runtime_names_the_package(
    monkeypatch: pytest.MonkeyPatch, bert_artifact: Path, tiny_bert: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r'not installed.*pip install "sparse-pst\[cpu\]"'):
        open_engine(bert_artifact)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r'pip install "sparse-pst\[train,cpu\]"'):
        open_engine(tiny_bert)


def test_two_distributions_of_one_module(monkeypatch: pytest.MonkeyPatch, bert_artifact: Path) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: types.SimpleNamespace(name=name))
    assert importlib.metadata.distribution("onnxruntime-gpu")
    with pytest.raises(EngineError, match=r"Both onnxruntime and onnxruntime-gpu.*pip uninstall"):
        open_engine(bert_artifact)


def test_fixed_dimensions_are_checked() -> None:
    specs = {"x": TensorSpec(name="x", dtype="float32", shape=("batch", 4))}
    check_feeds(specs, {"x": np.zeros((2, 4), np.float32)}, max_length=None)
    with pytest.raises(EngineError, match=r"the model wants"):
        check_feeds(specs, {"x": np.zeros((2, 5), np.float32)}, max_length=None)
