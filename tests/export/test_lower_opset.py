"""From opset 18 to 17: the same numbers from ONNX Runtime, or a refusal that says why."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.lower_opset import lower_to_17

from .conftest import graph

X = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)


def run(model: Any) -> "np.ndarray[Any, Any]":
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray[Any, Any] = session.run(None, {"x": X})[0]
    return result


def axes(*values: int) -> dict[str, Any]:
    return {"axes": np.array(values, np.int64)}


CASES = {
    "Split": graph([helper.make_node("Split", ["x"], ["y", "z"], axis=1, num_outputs=2)], {}, opset=18),
    "ReduceMean": graph([helper.make_node("ReduceMean", ["x", "axes"], ["y"])], axes(-1), opset=18),
    "ReduceMax, axes go": graph(
        [helper.make_node("ReduceMax", ["x", "axes"], ["y"], keepdims=0)], axes(0, 1), opset=18
    ),
    "ReduceMean of everything": graph([helper.make_node("ReduceMean", ["x"], ["y"])], {}, opset=18),
    "ReduceMean, explicit default": graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], noop_with_empty_axes=0)], axes(0), opset=18
    ),
    "ReduceSum kept": graph([helper.make_node("ReduceSum", ["x", "axes"], ["y"])], axes(1), opset=18),
    "Pad kept": graph(
        [helper.make_node("Pad", ["x", "axes"], ["y"])], {"axes": np.array([0, 1, 0, 1], np.int64)}, opset=18
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: str) -> None:
    older, newer = onnx.ModelProto(), CASES[case]
    older.CopyFrom(newer)
    assert lower_to_17(older) is None
    assert [entry.version for entry in older.opset_import] == [17]
    assert [name.name for name in older.graph.initializer if "go" in case] == []
    np.testing.assert_array_equal(run(older), run(newer))


def test_what_opset_17_cannot_say_is_left_as_it_was() -> None:
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])
    refused = {
        "ReduceMean has no form": graph([helper.make_node("ReduceMean", ["x", "x"], ["y"])], {}, opset=18),
        "ReduceMin has no form": graph(
            [helper.make_node("ReduceMin", ["x"], ["y"], noop_with_empty_axes=1)], {}, opset=18
        ),
        "Mish has no form": graph([helper.make_node("Mish", ["x"], ["y"])], {}, opset=18),
        "Split has no form": graph([helper.make_node("Split", ["x"], ["y", "z"], num_outputs=3)], {}, opset=18),
        "ScatterND has no form": graph(
            [helper.make_node("ScatterND", ["x", "i", "u"], ["y"], reduction="max")], {}, opset=18
        ),
        "subgraphs": graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
            {"c": np.array(True)},
            opset=18,
        ),
    }
    for words, model in refused.items():
        before = model.SerializeToString(deterministic=True)
        why = lower_to_17(model)
        assert why is not None
        assert words in why
        assert model.SerializeToString(deterministic=True) == before
