"""Products of given shapes: ONNX Runtime computes what numpy does, and the file is ONNX to its own checker."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from pst.errors import EngineError
from serve.engines._sparse_library import COMPILERS
from serve.engines.onnxruntime import load_runtime
from serve.predict.onnx_product import products_model
from serve.predict.onnxruntime_products import OnnxRuntimeProduct
from serve.predict.products import open_products, random_weights

compiles = pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="needs a C compiler")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_file_is_onnx(dtype: str) -> None:
    weights = [weight.T.astype(dtype) for weight in random_weights(300, 20, 2)]
    model = onnx.load_model_from_string(products_model(weights))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "MatMul"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(model.graph.initializer[1]), weights[1])
    assert [dim.dim_value or dim.dim_param for dim in model.graph.output[1].type.tensor_type.shape.dim] == [
        "tokens", 300,
    ]  # fmt: skip


def test_the_products_are_numpys() -> None:
    weights = random_weights(12, 20, 2)
    session = load_runtime().InferenceSession(products_model([weight.T for weight in weights]))
    x = np.random.default_rng(1).standard_normal((5, 20), dtype=np.float32)
    for found, weight in zip(session.run(None, {"x": x}), weights, strict=True):
        np.testing.assert_allclose(found, x @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_call_computes_every_product_and_tells_its_time() -> None:
    product = OnnxRuntimeProduct(load_runtime(), random_weights(12, 20, 3), dtype="float32", threads=1)
    call = product.at(7)
    for place in product.outputs:
        place.fill(np.nan)
    assert call() > 0
    assert [place.shape for place in product.outputs] == [(7, 12)] * 3
    assert np.isfinite(product.outputs).all()


@compiles
def test_kernels_that_skip_zeros_multiply(bert_artifact: Path) -> None:
    weights = random_weights(48, 64, 2)
    with open_products(bert_artifact, engine="onnxruntime-sparse", threads=2) as products:
        assert products.name == "onnxruntime-sparse"
        assert products.sparse("unstructured", weights) is None  # they are dense
        for weight in weights:
            weight *= np.random.default_rng(3).random(weight.shape) < 0.2
        found = products.sparse("unstructured", weights), products.dense(weights)
        for product in found:
            assert isinstance(product, OnnxRuntimeProduct)
            assert product.at(33)() > 0
    sparse, dense = found
    assert isinstance(sparse, OnnxRuntimeProduct)
    assert isinstance(dense, OnnxRuntimeProduct)
    assert (sparse.kernel, dense.kernel) == ("SparseLinear", "MatMul")
    for ours, theirs in zip(sparse.outputs, dense.outputs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_auto_without_a_compiler(bert_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise EngineError("There is no C compiler.")

    monkeypatch.setattr("serve.predict.products.sparse_library", none)
    with open_products(bert_artifact, engine="auto", threads=1) as products:
        assert products.name in ("onnxruntime-cpu", "torch-cuda")


def test_weights_are_the_same_each_time_and_differ_from_each_other() -> None:
    first, second = random_weights(8, 400, 2)
    np.testing.assert_array_equal(first, random_weights(8, 400, 1)[0])
    assert not np.array_equal(first, second)
    assert first.std() == pytest.approx(1 / 20, rel=0.1)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining"])
def test_an_encoder_as_pretraining_leaves_it(kind: str, tiny_bert: Path, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    getattr(transformers, kind)(transformers.BertConfig.from_pretrained(folder)).save_pretrained(folder)
    assert kind in (folder / "config.json").read_text(encoding="utf-8")
    with open_products(folder, engine="onnxruntime", threads=1) as products:
        assert products.model(1, 4)() > 0.0


def test_user_errors(bert_artifact: Path, tmp_path: Path) -> None:
    for engine, message in (
        ("tensorrt", "measures no products with tensorrt; choose onnxruntime, onnxruntime-sparse, torch-cuda or auto"),
        ("onnxruntime-cuda", "CUDA kernels multiply zeros as well"),
        ("torch-cpu", "on an NVIDIA GPU alone"),
    ):
        with pytest.raises(EngineError, match=message):
            open_products(bert_artifact, engine=engine, threads=1)
    shutil.copytree(bert_artifact, tmp_path / "int8")
    said = json.loads((tmp_path / "int8" / "export.json").read_text(encoding="utf-8"))
    (tmp_path / "int8" / "export.json").write_text(json.dumps(said | {"precision": "int8"}), encoding="utf-8")
    with pytest.raises(EngineError, match="has the precision int8; give the artifact"):
        open_products(tmp_path / "int8", engine="onnxruntime", threads=1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="as ONNX, and pst export refuses it: "):
        open_products(tmp_path, engine="onnxruntime", threads=1)
