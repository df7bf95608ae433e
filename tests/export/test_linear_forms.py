"""Linear layers as MatMul, Gemm and 1x1 Conv: the passes alone on graphs that show what they leave out and what not.

Whole models in every form are in test_matrix.py, test_precision.py and test_decoders.py.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.graph import find_weights
from export.inspect import inspect
from export.manifest import Manifest
from export.passes import LINEAR_FORMS, check_linear_form, run_passes
from export.pipeline import export
from pst.errors import ConfigError, ModelError
from pst.patterns import parse_pattern

from ..decoders import prune
from ..encoders import make_encoder
from .conftest import two_four

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
UP, DOWN = two_four(16, 8).T.copy(), two_four(8, 16, seed=1).T.copy()  # (8, 16) and (16, 8), 2:4 along axis 0
VECTORS = {
    "b1": RANDOM.standard_normal(16), "b2": RANDOM.standard_normal(8), "gain": RANDOM.standard_normal(8),
    "root": np.array(1.4142135), "one": np.array(1.0), "half": np.array(0.5), "scale": RANDOM.standard_normal(16),
}  # fmt: skip
CONSTANTS = {name: array.astype(np.float32) for name, array in VECTORS.items()}
GELU = [
    ("Div", ["h", "root"], "g1"), ("Erf", ["g1"], "g2"), ("Add", ["g2", "one"], "g3"), ("Mul", ["half", "g3"], "g4"),
    ("Mul", ["h", "g4"], "g"),
]  # fmt: skip
BLOCK = [
    ("MatMul", ["x", "up"], "p"), ("Add", ["b1", "p"], "h"), *GELU, ("MatMul", ["g", "down"], "q"),
    ("Add", ["q", "b2"], "r"), ("Add", ["r", "x"], "s"), ("LayerNormalization", ["s", "gain", "b2"], "y"),
]  # fmt: skip


def build(nodes: list[Any], tensors: dict[str, Array], shape: list[Any], **outputs: Any) -> Any:
    """A checked model of *nodes* (operator, inputs, output, attributes) with input x of *shape*, and output y.

    *outputs*, where they are given, are the shapes of all outputs by name.
    """
    made = [helper.make_node(op, inputs, [output], name=output, **dict(*more)) for op, inputs, output, *more in nodes]
    results = outputs or {"y": [*shape[:-1], None]}
    main = helper.make_graph(
        made, "main", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in results.items()],
        initializer=[onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    model = helper.make_model(main, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def block() -> Any:
    """A feed-forward layer with its residual sum and norm."""
    return build(BLOCK, CONSTANTS | {"up": UP, "down": DOWN}, ["batch", "length", 8])


def answers(model: Any, *shape: int) -> list[Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)
    found: list[Array] = session.run(None, {"x": x})
    return found


def to_form(model: Any, form: str, *names: str) -> Any:
    """A copy of *model* with the weights *names* in *form*, which computes the same; checked by onnx."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    run_passes(changed, {name: np.zeros(1) for name in names}, passes=LINEAR_FORMS[form])
    onnx.checker.check_model(changed, full_check=True)
    dims = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    for sizes in ((1, 1), (2, 5), (3, 1), (1, 7)):
        shape = [size or sizes[min(place, 1)] for place, size in enumerate(dims)]
        for before, after in zip(answers(model, *shape), answers(changed, *shape), strict=True):
            assert before.shape == after.shape
            np.testing.assert_allclose(after, before, atol=1e-5)
    return changed


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_gemm_stays_in_rows_from_the_first_layer_to_the_norm() -> None:
    found = to_form(block(), "gemm", "up", "down")
    assert operators(found) == Counter(
        {"Gemm": 2, "Div": 1, "Erf": 1, "Add": 2, "Mul": 2, "LayerNormalization": 1, "Reshape": 2, "Shape": 1,
         "Concat": 1, "Slice": 1}
    )  # fmt: skip
    assert [(w.op, w.axis, w.shape) for w in find_weights(found)] == [("Gemm", 1, (16, 8)), ("Gemm", 1, (8, 16))]
    assert all(len(node.input) == 3 for node in found.graph.node if node.op_type == "Gemm")  # the bias inside
    assert not any(node.attribute for node in found.graph.node if node.op_type == "Shape")  # TensorRT 8.6 ignores them


def test_conv_transposes_before_the_first_product_and_after_the_last() -> None:
    found = to_form(block(), "conv", "up", "down")
    kinds = operators(found)
    assert (kinds["Conv"], kinds["Transpose"], kinds["Unsqueeze"], kinds["Squeeze"], kinds["MatMul"]) == (2, 2, 1, 1, 0)
    weights = find_weights(found)
    assert [(w.op, w.axis, w.shape) for w in weights] == [("Conv", 1, (16, 8, 1, 1)), ("Conv", 1, (8, 16, 1, 1))]
    for weight, original in zip(weights, (UP, DOWN), strict=True):
        matrix, axis = weight.matrix()
        np.testing.assert_array_equal(matrix, original.T)
        assert parse_pattern("2:4").holds(matrix, axis=axis)


@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_of_gpt2s_gemm(transposed: bool) -> None:
    """Rows around a Gemm, as the exporter writes Conv1D, with the weight on either side of transB."""
    nodes = [
        ("Reshape", ["x", "rows"], "r"), ("Gemm", ["r", "up", "b1"], "g", {"transB": int(transposed)}),
        ("Shape", ["x"], "lead", {"start": 0, "end": 2}), ("Concat", ["lead", "width"], "full", {"axis": 0}),
        ("Reshape", ["g", "full"], "y"),
    ]  # fmt: skip
    shapes = {"rows": np.array([-1, 8]), "width": np.array([16])}
    weight = UP.T.copy() if transposed else UP
    model = build(nodes, shapes | CONSTANTS | {"up": weight}, ["batch", "length", 8])
    found = to_form(model, "matmul", "up")
    assert operators(found) == Counter({"MatMul": 1, "Add": 1})
    assert [(w.op, w.axis, w.shape) for w in find_weights(found)] == [("MatMul", 0, (8, 16))]
    assert operators(to_form(model, "conv", "up"))["Gemm"] == 0
    scaled = build([nodes[0], ("Gemm", ["r", "up"], "y", {"alpha": 2.0, "transB": int(transposed)})],
                   shapes | {"up": weight}, ["batch", "length", 8], y=[None, 16])  # fmt: skip
    assert operators(to_form(scaled, "matmul", "up"))["Gemm"] == 1


@pytest.mark.parametrize("form", ["gemm", "conv"])
def test_two_dimensions(form: str) -> None:
    nodes = [("MatMul", ["x", "up"], "p"), ("Add", ["p", "b1"], "h"), ("Mul", ["h", "scale"], "y")]
    found = to_form(build(nodes, CONSTANTS | {"up": UP}, ["rows", 8]), form, "up")
    assert operators(found)["MatMul"] == 0


@pytest.mark.parametrize("form", ["gemm", "conv"])
def test_a_weight_with_another_reader_keeps_its_form(form: str) -> None:
    nodes = [("MatMul", ["x", "up"], "p"), ("Transpose", ["up"], "t"), ("MatMul", ["p", "t"], "y")]
    model = build(nodes, {"up": UP}, ["batch", "length", 8])
    assert operators(to_form(model, form, "up"))["MatMul"] == 2
    four = build([("MatMul", ["x", "up"], "y")], {"up": UP}, ["batch", "heads", "length", 8])
    assert operators(to_form(four, form, "up"))["MatMul"] == 1
    assert operators(to_form(block(), form, "down"))["MatMul"] == 1  # the other weight was not asked for


@pytest.mark.parametrize("form", ["gemm", "conv"])
def test_values_that_others_read_keep_their_layout_and_name(form: str) -> None:
    nodes = [
        ("MatMul", ["x", "up"], "p"),
        ("Add", ["p", "b1"], "h"),
        ("Mul", ["p", "p"], "m"),
        ("Add", ["h", "m"], "y"),
    ]
    model = build(nodes, CONSTANTS | {"up": UP}, ["batch", "length", 8], y=["batch", "length", 16],
                  p=["batch", "length", 16])  # fmt: skip
    found = to_form(model, form, "up")
    assert [value.name for value in found.graph.output] == ["y", "p"]


@pytest.mark.parametrize("form", ["gemm", "conv"])
def test_what_is_spread_over_another_is_not_taken_along(form: str) -> None:
    """(1, length, features) added to (batch, length, features): rows would not fit each other."""
    table = RANDOM.standard_normal((1, 1, 16)).astype(np.float32)
    nodes = [("MatMul", ["x", "up"], "p"), ("Add", ["p", "table"], "h"), ("ReduceMax", ["h"], "top", {"axes": [0]}),
             ("Add", ["p", "top"], "z"), ("Tanh", ["z"], "y")]  # fmt: skip
    model = build(nodes, {"up": UP, "table": table}, ["batch", "length", 8])
    to_form(model, form, "up")


def test_conv_splits_and_joins_heads_without_a_transpose_more() -> None:
    shapes = {"split": np.array([0, 0, 2, 4]), "join": np.array([0, 0, 8])}
    square = {name: two_four(8, 8, seed=seed).T.copy() for seed, name in enumerate(("q", "k", "v", "o"))}
    heads, nodes = {"perm": [0, 2, 1, 3]}, list[Any]()
    for name in ("q", "k", "v"):
        nodes += [("MatMul", ["x", name], f"{name}1"), ("Add", [f"{name}1", "b2"], f"{name}2")]
        nodes += [("Reshape", [f"{name}2", "split"], f"{name}3"), ("Transpose", [f"{name}3"], f"{name}4", heads)]
    nodes += [("Transpose", ["k4"], "kt", {"perm": [0, 1, 3, 2]}), ("MatMul", ["q4", "kt"], "scores")]
    nodes += [("Softmax", ["scores"], "weights"), ("MatMul", ["weights", "v4"], "context")]
    nodes += [("Transpose", ["context"], "c1", heads), ("Reshape", ["c1", "join"], "c"), ("MatMul", ["c", "o"], "y")]
    model = build(nodes, shapes | CONSTANTS | square, ["batch", "length", 8])
    before = operators(model)["Transpose"]
    found = to_form(model, "conv", "q", "k", "v", "o")
    assert operators(found)["Transpose"] == before + 2  # of x, and of y
    assert operators(to_form(model, "gemm", "q", "k", "v", "o"))["Transpose"] == before
    # Heads that are split and joined again, with nothing in between.
    alone: list[Any] = [("MatMul", ["x", "q"], "a"), ("Reshape", ["a", "split"], "b"), ("Transpose", ["b"], "c", heads)]
    alone += [("Transpose", ["c"], "d", heads), ("Reshape", ["d", "join"], "e"), ("MatMul", ["e", "o"], "y")]
    to_form(build(alone, shapes | square, ["batch", "length", 8]), "conv", "q", "o")


def test_means_along_another_axis_are_not_rows() -> None:
    for axes in ([-1], [1], [2]):
        nodes = [("MatMul", ["x", "up"], "p"), ("ReduceMean", ["p"], "m", {"axes": axes}), ("Sub", ["p", "m"], "y")]
        to_form(build(nodes, {"up": UP}, ["batch", "length", 8]), "gemm", "up")


def test_subgraphs_are_refused() -> None:
    model = block()
    inner = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["z"])], "inner", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    model.graph.node.append(helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner))
    with pytest.raises(ModelError, match="use --linear-form auto"):
        run_passes(model, {"up": UP}, passes=LINEAR_FORMS["conv"])


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown linear form 'Gem'; did you mean 'gemm'"):
        check_linear_form("Gem")
    with pytest.raises(ConfigError, match="use one of auto, matmul, gemm, conv"):
        check_linear_form("einsum")


def test_a_convolution_in_bf16_needs_a_newer_opset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Conv takes bf16 from opset 22 on; use --opset 22, --precision fp16"):
        export(tmp_path / "model", tmp_path / "out", linear_form="conv", precision="bf16")


def test_inspect_and_manifest_name_the_form_and_the_axis(tmp_path: Path) -> None:
    folder = prune(make_encoder(tmp_path / "model", "bert", "classification"), "2:4")
    manifest = export(folder, tmp_path / "conv", linear_form="conv", opset=18)
    assert {(row.form, row.axis, len(row.shape)) for row in manifest.weights} == {("Conv", 1, 4)}
    assert Manifest.load(tmp_path / "conv").weights == manifest.weights
    found = inspect(tmp_path / "conv")
    rows = {row.name: row for row in found.weights}
    pruned = rows["bert.encoder.layer.0.intermediate.dense.weight"]
    assert (pruned.form, pruned.axis, pruned.shape) == ("Conv", 1, (64, 32, 1, 1))
    assert pruned.patterns[0] == "2:4"
    assert rows["classifier.weight"].form in ("Gemm", "MatMul")
    line = next(line for line in found.render(terminal=False).splitlines() if "intermediate" in line)
    assert " Conv " in line
    assert "Linear" in inspect(folder).render(terminal=False)
