"""Artifacts of the tiny models, each exported once, and hand-made ONNX graphs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Artifact = Callable[[str, float], Path]


@pytest.fixture(scope="session")
def artifact(tiny_bert: Path, sparse_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """``artifact("2:4", 0.5)``: the folder that exporting that sparse model wrote; "dense" is the model as it is."""
    made: dict[tuple[str, float], Path] = {}

    def make(pattern: str, sparsity: float = 0.5) -> Path:
        from export.pipeline import export

        if (pattern, sparsity) not in made:
            output = tmp_path_factory.mktemp("artifact") / "out"
            export(tiny_bert if pattern == "dense" else sparse_model(pattern, sparsity), output)
            made[pattern, sparsity] = output
        return made[pattern, sparsity]

    return make


def graph(nodes: list[Any], tensors: dict[str, Any], *, opset: int = 17) -> Any:
    """A ModelProto with float input ``x``, output ``y`` and *tensors* (arrays) as initializers; not type-checked."""
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    main = helper.make_graph(nodes, "main", value[:1], value[1:], initializer=initializers)
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def matmul_model(weight: "np.ndarray[Any, Any]") -> Any:
    """y = x @ weight."""
    return graph([helper.make_node("MatMul", ["x", "W"], ["y"], name="product")], {"W": weight})


def save(model: Any, path: Path, **options: Any) -> Path:
    """Write *model* to *path*, with onnx.save's options."""
    onnx.save(model, path, **options)
    return path


def two_four(rows: int, columns: int, *, seed: int = 0) -> "np.ndarray[Any, Any]":
    """A float32 array that holds 2:4 along axis 1 with exactly two zeros in each group, at random places."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    order = random.random((rows, columns // 4, 4)).argsort(-1)
    weight[(order < 2).reshape(rows, columns)] = 0
    return weight
