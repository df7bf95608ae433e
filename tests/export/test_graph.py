"""Finding weights and their reduction axis, against what the graph computes."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph import as_matrix, find_weights, load_onnx
from pst.errors import ArtifactError

from .conftest import graph, matmul_model, save

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((6, 4)).astype(np.float32)  # K = 6, N = 4


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attributes)


def int8(name: str) -> tuple[list[Any], dict[str, Any]]:
    """DequantizeLinear of an int8 (6, 4) weight with a zero point per output column."""
    tensors = {
        name: RANDOM.integers(-128, 127, (6, 4)).astype(np.int8),
        "scale": np.full(4, 0.1, np.float32),
        "zero": np.array([0, 1, 2, 3], np.int8),
    }
    return [node("DequantizeLinear", [name, "scale", "zero"], "deq", axis=1)], tensors


GRAPHS = {
    "MatMul": (graph([node("MatMul", ["x", "W"], "y")], {"W": W}), 0),
    "MatMul, weight first": (graph([node("MatMul", ["W", "x"], "y")], {"W": W.T.copy()}), 1),
    "Gemm transB=0": (graph([node("Gemm", ["x", "W"], "y")], {"W": W}), 0),
    "Gemm transB=1": (graph([node("Gemm", ["x", "W"], "y", transB=1)], {"W": W.T.copy()}), 1),
    "Gemm transA=1, weight first": (graph([node("Gemm", ["W", "x"], "y", transA=1)], {"W": W}), 0),
    "Transpose with perm": (
        graph([node("Transpose", ["W"], "t", perm=[1, 0]), node("MatMul", ["x", "t"], "y")], {"W": W.T.copy()}),
        1,
    ),
    "Transpose without perm": (
        graph([node("Transpose", ["W"], "t"), node("MatMul", ["x", "t"], "y")], {"W": W.T.copy()}),
        1,
    ),
    "two Transposes": (
        graph(
            [
                node("Transpose", ["W"], "t"),
                node("Transpose", ["t"], "u", perm=[1, 0]),
                node("MatMul", ["x", "u"], "y"),
            ],
            {"W": W},
        ),
        0,
    ),
    "Cast": (
        graph([node("Cast", ["W"], "c", to=TensorProto.FLOAT), node("MatMul", ["x", "c"], "y")],
              {"W": W.astype(np.float16)}),
        0,
    ),
    "Identity": (graph([node("Identity", ["W"], "c"), node("MatMul", ["x", "c"], "y")], {"W": W}), 0),
    "Constant node": (
        graph([node("Constant", [], "W", value=numpy_helper.from_array(W)), node("MatMul", ["x", "W"], "y")], {}),
        0,
    ),
    "QuantizeLinear and DequantizeLinear": (
        graph(
            [
                node("QuantizeLinear", ["W", "s", "z"], "q"),
                node("DequantizeLinear", ["q", "s", "z"], "d"),
                node("Transpose", ["d"], "t", perm=[1, 0]),
                node("MatMul", ["x", "t"], "y"),
            ],
            {"W": W.T.copy(), "s": np.float32(0.1), "z": np.int8(0)},
        ),
        1,
    ),
    "DequantizeLinear": (graph([*int8("W")[0], node("MatMul", ["x", "deq"], "y")], int8("W")[1]), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_reduction_axis(case: str) -> None:
    """Oracle: only a change along the reduction axis at index k can be undone by x's k-th entry being zero."""
    model, axis = GRAPHS[case]
    (weight,) = find_weights(model)
    assert (weight.name, weight.axis) == ("W", axis)
    assert weight.shape[axis] == 6

    # The runtime's own answer: with all of x but index k zero, only slice k of the weight along the axis matters.
    session = onnxruntime.InferenceSession(_typed(model).SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.zeros((1, 6), np.float32)
    x[0, 2] = 1.0
    if case.endswith("weight first"):
        x = x.T.copy()
    result = session.run(None, {"x": x})[0].reshape(-1)
    expected = np.take(weight.values().astype(np.float32), 2, axis=weight.axis)
    scale = 0.1 if case == "DequantizeLinear" else 1.0
    tolerance = 0.06 if case.startswith("Quantize") else 1e-6
    np.testing.assert_allclose(result, expected * scale, atol=tolerance)


def _typed(model: Any) -> Any:
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    return typed


def test_one_by_one_conv() -> None:
    kernel = RANDOM.standard_normal((4, 6, 1, 1)).astype(np.float32)
    (weight,) = find_weights(graph([node("Conv", ["x", "K"], "y")], {"K": kernel}))
    assert (weight.axis, weight.shape) == (1, (4, 6, 1, 1))
    matrix, axis = as_matrix(weight.values(), weight.axis)
    np.testing.assert_array_equal(matrix, kernel[:, :, 0, 0])
    assert axis == 1


def test_wide_conv_and_products_of_activations_are_no_weights() -> None:
    kernel = np.ones((4, 6, 3, 3), np.float32)
    assert find_weights(graph([node("Conv", ["x", "K"], "y")], {"K": kernel})) == []
    assert find_weights(graph([node("Relu", ["x"], "r"), node("MatMul", ["x", "r"], "y")], {})) == []
    assert find_weights(graph([node("MatMul", ["x", "b"], "y")], {"b": np.ones(6, np.float32)})) == []


def test_zero_point_is_taken_off() -> None:
    nodes, tensors = int8("W")
    tensors["W"][2] = tensors["zero"]  # input 2 is all zero once read
    (weight,) = find_weights(graph([*nodes, node("MatMul", ["x", "deq"], "y")], tensors))
    assert np.flatnonzero((weight.values() == 0).all(axis=1)).tolist() == [2]


def test_zero_point_follows_a_transpose_and_blocks() -> None:
    stored = RANDOM.integers(-9, 9, (4, 6)).astype(np.int8)
    zero = np.array([1, 2, 3, 4], np.int8)
    nodes = [
        node("Transpose", ["W"], "t", perm=[1, 0]),
        node("DequantizeLinear", ["t", "s", "z"], "d", axis=1),
        node("MatMul", ["x", "d"], "y"),
    ]
    (weight,) = find_weights(graph(nodes, {"W": stored, "s": np.ones(4, np.float32), "z": zero}))
    np.testing.assert_array_equal(weight.values(), stored.astype(np.int32) - zero[:, None])

    blocks = RANDOM.integers(-3, 3, (4, 3)).astype(np.int8)  # one per two entries along axis 1
    nodes = [node("DequantizeLinear", ["W", "s", "z"], "d", axis=1, block_size=2), node("Gemm", ["x", "d"], "y")]
    (weight,) = find_weights(graph(nodes, {"W": stored, "s": np.ones((4, 3), np.float32), "z": blocks}))
    np.testing.assert_array_equal(weight.values(), stored.astype(np.int32) - np.repeat(blocks, 2, axis=1))


def test_integer_products() -> None:
    weight = RANDOM.integers(0, 255, (6, 4)).astype(np.uint8)
    tensors = {"W": weight, "az": np.uint8(0), "z": np.full(4, 128, np.uint8), "s": np.float32(1)}
    for op, inputs in (
        ("MatMulInteger", ["x", "W", "az", "z"]),
        ("QLinearMatMul", ["x", "s", "az", "W", "s", "z", "s", "az"]),
        ("DynamicQuantizeMatMul", ["x", "W", "s", "z"]),
    ):
        (found,) = find_weights(graph([node(op, inputs, "y")], tensors))
        assert found.axis == 0
        np.testing.assert_array_equal(found.values(), weight.astype(np.int32) - 128)


def test_sparse_initializer() -> None:
    dense = np.array([[0, 2.0], [0, 0], [3.0, 0]], np.float32)
    for indices in (np.array([1, 4]), np.array([[0, 1], [2, 0]])):
        model = graph([node("MatMul", ["x", "W"], "y")], {})
        values = numpy_helper.from_array(np.array([2.0, 3.0], np.float32), "W")
        sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64), "i"), [3, 2])
        model.graph.sparse_initializer.append(sparse)
        (weight,) = find_weights(model)
        np.testing.assert_array_equal(weight.values(), dense)
        assert weight.itemsize == 4


def test_shared_weight_and_subgraph() -> None:
    branch = helper.make_graph(
        [node("MatMul", ["x", "W"], "b")], "branch", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    )
    nodes = [
        node("MatMul", ["x", "W"], "first"),
        node("If", ["condition"], "y", then_branch=branch, else_branch=branch),
    ]
    (weight,) = find_weights(graph(nodes, {"W": W, "condition": np.array(True)}))
    assert weight.nodes == ("MatMul_first", "MatMul_b", "MatMul_b")


def test_bfloat16_values() -> None:
    (weight,) = find_weights(matmul_model(W.astype(ml_dtypes.bfloat16)))
    assert weight.itemsize == 2
    assert np.count_nonzero(weight.values()) == W.size


def test_external_data(tmp_path: Path) -> None:
    model = matmul_model(np.arange(4096, dtype=np.float32).reshape(64, 64))
    path = save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    (weight,) = find_weights(load_onnx(path))
    assert weight.values()[63, 63] == 4095

    data = tmp_path / "m.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="cut off: tensor W ends at byte 16384"):
        load_onnx(path)
    data.unlink()
    with pytest.raises(ArtifactError, match=r"m\.onnx\.data, which is missing"):
        load_onnx(path)


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    model = matmul_model(W)
    save(model, tmp_path / "sub" / "m.onnx", save_as_external_data=True, location="d", size_threshold=0)
    changed = onnx.load(tmp_path / "sub" / "m.onnx", load_external_data=False)
    next(entry for entry in changed.graph.initializer[0].external_data if entry.key == "location").value = "../secret"
    (tmp_path / "sub" / "m.onnx").write_bytes(changed.SerializeToString())
    (tmp_path / "secret").write_bytes(b"x" * 96)
    with pytest.raises(ArtifactError, match="outside its own folder"):
        load_onnx(tmp_path / "sub" / "m.onnx")


def test_damaged_files(tmp_path: Path) -> None:
    path = save(matmul_model(W), tmp_path / "m.onnx")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"damaged or cut off|empty"):
            load_onnx(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ArtifactError, match="git lfs pull"):
        load_onnx(path)
    with pytest.raises(ArtifactError, match="not there"):
        load_onnx(tmp_path / "none.onnx")


def test_tensor_shorter_than_its_shape() -> None:
    model = matmul_model(W)
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    (weight,) = find_weights(model)
    with pytest.raises(ArtifactError, match="does not fit its shape"):
        weight.values()
