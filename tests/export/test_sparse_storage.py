"""Sparse initializers: every number kept, smaller only where it pays, and the answers of dense storage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from export.graph import find_weights, load_onnx, to_array
from export.inspect import inspect
from export.pipeline import export
from export.sparse_storage import store_sparse
from pst.errors import ConfigError
from serve.engines import open_engine

from .conftest import Artifact, matmul_model, save
from .test_pipeline import SENTENCES, run_plainly


def sparse_weight(kept: int, dtype: Any) -> "np.ndarray[Any, Any]":
    """72 x 8 with *kept* entries of 1 to 100, at random places."""
    random = np.random.default_rng(0)
    weight = np.zeros(576, np.float32)
    weight[random.permutation(576)[:kept]] = random.integers(1, 100, kept)
    return weight.reshape(72, 8).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "most"), [(np.float32, 191), (np.float16, 115), (ml_dtypes.bfloat16, 115), (np.int8, 63)]
)
def test_only_what_gains_and_every_number(dtype: Any, most: int) -> None:
    """An entry costs b bytes dense, b + 8 sparse: of 576 entries, fewer than 576 b / (b + 8) may be kept."""
    for kept, expected in ((most, ["W"]), (most + 1, [])):
        weight = sparse_weight(kept, dtype)
        model = matmul_model(weight * (-1 if np.dtype(dtype) == np.float32 else 1))  # with negative zeros
        names, saved = store_sparse(model)
        assert names == expected
        assert saved == (weight.nbytes - kept * (weight.itemsize + 8) if names else 0)
        assert len(model.graph.initializer) + len(names) == 1
        for stored in model.graph.sparse_initializer:
            np.testing.assert_array_equal(np.abs(to_array(stored, "W").astype(np.float32)), weight.astype(np.float32))
            places = numpy_helper.to_array(stored.indices)
            assert places.dtype == np.int64
            assert (np.diff(places) > 0).all()


def test_onnx_runtime_gives_the_same_bits(tmp_path: Path) -> None:
    weight = sparse_weight(100, np.float32)
    dense, sparse = matmul_model(weight), matmul_model(weight)
    for value in (dense.graph.input[0], sparse.graph.input[0]):
        value.CopyFrom(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 72]))
    assert store_sparse(sparse)[0] == ["W"]
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 72)).astype(np.float32)}
    found = [
        onnxruntime.InferenceSession(str(save(model, tmp_path / f"{name}.onnx"))).run(None, feeds)[0]
        for name, model in (("dense", dense), ("sparse", sparse))
    ]
    assert found[0].tobytes() == found[1].tobytes()


def test_artifact(
    artifact: Artifact, sparse_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = artifact("unstructured", 0.8)
    manifest = export(sparse_model("unstructured", 0.8), tmp_path / "out", storage="sparse")
    saved = (dense / "model.onnx").stat().st_size - (tmp_path / "out" / "model.onnx").stat().st_size
    assert saved > 0.3 * 16384 * 4  # of 4 bytes an entry, 0.2 * 12 stay
    assert "tensors are stored without their zeros" in capsys.readouterr().err
    assert run_plainly(tmp_path / "out", SENTENCES).tobytes() == run_plainly(dense, SENTENCES).tobytes()
    kinds = {type(weight.tensor).__name__ for weight in find_weights(load_onnx(tmp_path / "out" / "model.onnx"))}
    assert kinds == {"SparseTensorProto", "TensorProto"}  # pruned, and the head
    assert len(manifest.weights) == 12
    before, after = inspect(dense), inspect(tmp_path / "out")
    rows = [[replace(row, zstd_bytes=0) for row in found.weights] for found in (before, after)]
    assert rows[0] == rows[1]  # but for negative zeros, which compress worse
    assert before.totals.dense_bytes - before.totals.sparse_bytes == pytest.approx(saved, abs=12 * 1000)
    with open_engine(tmp_path / "out", engine="onnxruntime") as engine:
        assert "logits" in engine.outputs


def test_unknown_storage(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown storage 'zip'; use one of dense, sparse"):
        export(tiny_bert, tmp_path / "out", storage="zip")
