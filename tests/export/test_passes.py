"""Each pass alone, on graphs where its claims can be seen."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.passes import (
    PASSES,
    drop_nan_guard,
    lower_ir_version,
    name_weights,
    regroup_gelu,
    run_passes,
    share_equal,
    strip_metadata,
)

from .conftest import graph, matmul_model

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((8, 4)).astype(np.float32)


def names(model: Any) -> list[str]:
    return [tensor.name for tensor in model.graph.initializer]


def run(model: Any, x: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {"x": x})[0]
    return result


def test_strip_metadata_everywhere() -> None:
    branch = graph([helper.make_node("MatMul", ["x", "W"], ["b"])], {"W": W}).graph
    model = matmul_model(W)
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model.graph.node.append(node)
    model.functions.append(
        helper.make_function("local", "f", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], model.opset_import)
    )
    clean = model.SerializeToString()
    function = model.functions[0]
    inner = model.graph.node[1].attribute[0].g
    for message in (
        model, model.graph, model.graph.node[0], model.graph.input[0], model.graph.output[0], function,
        function.node[0], model.graph.initializer[0], inner, inner.node[0], inner.initializer[0],
    ):  # fmt: skip
        message.doc_string = "File /home/someone/model.py"
        message.metadata_props.add(key="trace", value="/home/someone/model.py")
    model.graph.node[1].attribute[0].doc_string = "/home/someone"
    model.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, None))
    assert strip_metadata.run(model, {})
    assert model.SerializeToString() == clean
    assert not strip_metadata.run(model, {})


def test_name_weights() -> None:
    other = W + 1
    model = graph(
        [
            helper.make_node("MatMul", ["x", "val_1"], ["a"]),
            helper.make_node("Gemm", ["a", "model.head.weight"], ["y"], transB=1),
        ],
        {"val_1": W, "model.head.weight": np.ones((3, 4), np.float32), "val_2": other, "val_3": np.float32(3)},
    )
    x = RANDOM.standard_normal((2, 8)).astype(np.float32)
    before = run(model, x)
    weights = {
        "first.weight": W.T.copy(), "head.weight": np.ones((3, 4), np.float32), "other": W + 2,
        "scale": np.array(3, np.float32),
    }  # fmt: skip
    assert name_weights.run(model, weights)
    assert names(model) == ["first.weight", "head.weight", "val_2", "val_3"]
    np.testing.assert_array_equal(run(model, x), before)
    assert not name_weights.run(model, weights)


def test_name_weights_is_one_to_one_and_exact() -> None:
    model = graph(
        [helper.make_node("MatMul", ["x", "val_1"], ["a"]), helper.make_node("MatMul", ["a", "val_2"], ["y"])],
        {"val_1": np.ones((4, 4), np.float32), "val_2": np.ones((4, 4), np.float32)},
    )
    weights = {"a.weight": np.ones((4, 4), np.float32), "b.weight": np.ones((4, 4), np.float32)}
    name_weights.run(model, weights)
    assert names(model) == ["a.weight", "b.weight"]

    almost = matmul_model(W)
    changed = W.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], np.float32(np.inf))
    assert not name_weights.run(almost, {"w": changed, "v": W.astype(np.float64)})
    # The exporter's own name is no proof: a tensor that changed value keeps it.
    renamed = graph([helper.make_node("MatMul", ["x", "model.w"], ["y"])], {"model.w": W})
    assert not name_weights.run(renamed, {"w": changed})
    # A name that the graph uses already is not given again.
    taken = graph([helper.make_node("MatMul", ["x", "v"], ["y"])], {"v": W})
    assert not name_weights.run(taken, {"y": W})


def test_name_weights_reaches_subgraphs() -> None:
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["x", "val_1"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    model = graph([node], {"val_1": W, "c": np.array(True)})
    name_weights.run(model, {"w": W})
    assert model.graph.node[0].attribute[0].g.node[0].input[1] == "w"
    x = np.ones((1, 8), np.float32)
    np.testing.assert_allclose(run(model, x), x @ W, rtol=1e-5)


def test_share_equal() -> None:
    large = RANDOM.standard_normal((32, 32)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "a"], ["t"])]
    nodes += [helper.make_node("MatMul", ["t", "b"], ["u"]), helper.make_node("MatMul", ["u", "c"], ["y"])]
    model = graph(nodes, {"a": large, "b": large, "c": large + 1, "d": W, "e": W})
    x = RANDOM.standard_normal((2, 32)).astype(np.float32)
    before = run(model, x)
    assert share_equal.run(model, {})
    assert names(model) == ["a", "c", "d", "e"]  # d and e are small
    np.testing.assert_array_equal(run(model, x), before)
    assert not share_equal.run(model, {})


def test_lower_ir_version() -> None:
    model = matmul_model(W)
    model.ir_version = 10
    assert lower_ir_version.run(model, {})
    assert model.ir_version == 8
    assert not lower_ir_version.run(model, {})
    model.ir_version = 10
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2, np.int8), "q"))
    model.graph.initializer[-1].data_type = TensorProto.FLOAT8E4M3FN
    assert not lower_ir_version.run(model, {})


def test_all_passes_leave_a_valid_graph() -> None:
    model = matmul_model(W)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]))
    model.doc_string = "x"
    assert run_passes(model, {"weight": W.T.copy()}) == ["strip_metadata", "name_weights"]
    assert set(PASSES) > {"strip_metadata", "name_weights"}
    onnx.checker.check_model(model, full_check=True)


def attention(*, least: float, output: str = "guarded") -> Any:
    """Attention's weights, as they are exported; of the mask's rows the first sees one place, the second none."""
    nodes = [
        helper.make_node("Where", ["seen", "zero", "least"], ["mask"]),
        helper.make_node("Add", ["x", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["s"], axis=-1),
        helper.make_node("IsNaN", ["s"], ["asked"]),
        helper.make_node("Where", ["asked", "zero", "s"], ["guarded"]),
        helper.make_node("Identity", [output], ["y"]),
    ]
    seen = np.array([[True, False], [False, False]])
    return graph(nodes, {"seen": seen, "zero": np.float32(0), "least": np.float32(least)})


@pytest.mark.parametrize(("least", "before"), [(-np.inf, 0.0), (float(np.finfo(np.float32).min), 0.5)])
def test_drop_nan_guard(least: float, before: float) -> None:
    model = attention(least=least)
    x = np.array([[5.0, 900.0], [0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(run(model, x), [[1, 0], [before, before]])
    assert drop_nan_guard.run(model, {})
    assert [node.op_type for node in model.graph.node] == ["Where", "Add", "Softmax", "Identity"]
    np.testing.assert_array_equal(run(model, x), [[1, 0], [0.5, 0.5]])  # what sees nothing is finite
    assert not drop_nan_guard.run(model, {})
    # The sum stays finite in fp16 for scores as large as the mask.
    assert np.isfinite(np.float16(drop_nan_guard.MASKED) + np.float16(drop_nan_guard.MASKED))


def test_a_guard_that_may_be_needed_stays() -> None:
    assert not drop_nan_guard.run(attention(least=-100), {})  # no mask: it lets something through
    for output in ("mask", "asked"):  # something else reads what would change
        model = attention(least=-np.inf, output=output)
        model.graph.output.append(helper.make_tensor_value_info("guarded", TensorProto.FLOAT, None))
        assert not drop_nan_guard.run(model, {})


# regroup_gelu ---------------------------------------------------------------------------------------------------------


def gelu(*, flipped: bool) -> Any:
    """y = x * (0.5 * (1 + erf(x / sqrt(2)))), as torch.onnx writes it; *flipped* swaps the factors of each product."""
    products = [["half", "sum"], ["x", "scaled"]]
    if flipped:
        products = [pair[::-1] for pair in products]
    nodes = [
        helper.make_node("Div", ["x", "root"], ["divided"]),
        helper.make_node("Erf", ["divided"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["sum"]),
        helper.make_node("Mul", products[0], ["scaled"]),
        helper.make_node("Mul", products[1], ["y"]),
    ]
    constants = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    return graph(nodes, {name: np.array(value) for name, value in constants.items()})


@pytest.mark.parametrize("flipped", [False, True])
def test_gelu_becomes_one_operator_of_the_same_bits(flipped: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    found = []
    for regrouped in (False, True):
        model = gelu(flipped=flipped)
        for value in (*model.graph.input, *model.graph.output):
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [64, 32]))
        if regrouped:
            assert regroup_gelu.run(model, {})
            assert not regroup_gelu.run(model, {})
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        found.append(onnxruntime.InferenceSession(model.SerializeToString(), plain).run(None, {"x": x})[0])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options)
        kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
        assert (kinds == ["Gelu"]) == regrouped
    assert found[0].tobytes() == found[1].tobytes()


def test_a_product_that_is_read_twice_stays() -> None:
    model = gelu(flipped=False)
    model.graph.node.append(helper.make_node("Identity", ["scaled"], ["z"]))
    before = model.SerializeToString()
    assert not regroup_gelu.run(model, {})
    assert model.SerializeToString() == before
