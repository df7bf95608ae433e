"""The passes that make attention plain: the same bits, in nodes that every runtime knows."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.passes import plain_mask, plain_shapes, run_passes, turn_keys
from export.source import load_source
from export.trace import trace

from ..decoders import make_decoder
from ..encoders import make_encoder

MINE = ("turn_keys", "plain_mask", "plain_shapes")


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def answers(model: Any, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    return found


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "mpnet", "electra"])
def test_an_encoder_computes_the_same_bits_in_plain_nodes(architecture: str, tmp_path: Path) -> None:
    model = trace(load_source(make_encoder(tmp_path, architecture, "classification")), opset=17)
    feeds = []
    for batch, length in ((1, 1), (1, 7), (3, 12)):
        mask = np.ones((batch, length), np.int64)
        mask[-1, length // 2 + 1 :] = 0
        ids = np.random.default_rng(length).integers(5, 30, mask.shape)
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    run_passes(model, {}, passes=("strip_metadata", "drop_nan_guard"))
    before = [answers(model, each)[0] for each in feeds]
    had = operators(model)
    turned = 0 if architecture == "mpnet" else 2  # MPNet writes attention itself, and its keys plainly; two layers
    assert run_passes(model, {}, passes=MINE) == [name for name in MINE if turned or name != "turn_keys"]
    onnx.checker.check_model(model, full_check=True)
    for each, expected in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(answers(model, each)[0], expected)
    has = operators(model)
    assert had["GatherND"] > has["GatherND"] == 0
    assert has["Reshape"] == had["Reshape"] - 2 * turned
    assert not any(node.attribute for node in model.graph.node if node.op_type == "Shape")
    assert run_passes(model, {}, passes=MINE) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_keeps_what_depends_on_the_query(kind: str, tmp_path: Path) -> None:
    model = trace(load_source(make_decoder(tmp_path, kind)), opset=17)
    feeds: dict[str, Any] = {
        value.name: np.zeros([{"batch_size": 2, "past_sequence_length": 3}.get(d.dim_param, d.dim_value or 4)
                              for d in value.type.tensor_type.shape.dim], np.float32)
        for value in model.graph.input
    }  # fmt: skip
    feeds["input_ids"] = np.random.default_rng(0).integers(5, 30, (2, 4))
    feeds["attention_mask"] = np.array([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    feeds["position_ids"] = np.array([[2, 3, 4, 5], [3, 4, 5, 6]])
    run_passes(model, {}, passes=("strip_metadata", "drop_nan_guard"))
    before, had = answers(model, feeds), operators(model)
    run_passes(model, {}, passes=MINE)
    for now, expected in zip(answers(model, feeds), before, strict=True):
        np.testing.assert_array_equal(now, expected)
    assert operators(model)["LessOrEqual"] == had["LessOrEqual"] > 0


def shape_of(**attributes: int) -> Any:
    node = helper.make_node("Shape", ["x"], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c"])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, None)
    graph = helper.make_graph([node], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("attributes", [{"start": 1}, {"end": -1}, {"start": -2, "end": 3}, {"start": 0}, {"end": 9}])
def test_a_part_of_a_shape(attributes: dict[str, int]) -> None:
    model, x = shape_of(**attributes), {"x": np.zeros((2, 5, 7), np.float32)}
    expected = answers(model, x)[0]
    assert plain_shapes.run(model, {})
    np.testing.assert_array_equal(answers(model, x)[0], expected)
    assert not plain_shapes.run(model, {})


def test_parts_that_a_later_pass_asks_for() -> None:
    model, x = shape_of(start=1), {"x": np.zeros((2, 5, 7), np.float32)}
    plain_shapes.run(model, {})
    model.graph.node.append(helper.make_node("Shape", ["x"], ["z"], start=1, end=2))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.INT64, [1]))
    assert plain_shapes.run(model, {})
    assert len({tensor.name for tensor in model.graph.initializer}) == len(model.graph.initializer) == 4
    y, z = answers(model, x)
    assert (y.tolist(), z.tolist()) == ([5, 7], [5])
    assert [node.op_type for node in model.graph.node] == ["Shape", "Slice", "Slice"]


def test_a_whole_shape_stays() -> None:
    assert not plain_shapes.run(shape_of(), {})


def gathered(*, axis: int = 2, start: int = 0, added: bool = True) -> Any:
    """scores + Where(mask gathered at every row and place, 0, -30000), as torch.onnx writes it, and ways to differ."""
    one = {name: numpy_helper.from_array(np.array(value, np.int64), name) for name, value in
           {"from": start, "zero": 0, "one": 1, "at": [axis], "at3": [3], "first": [0, 1], "last": [-1],
            "rows": [1, 2], "until": [1], "begin": [0], "two": [2]}.items()}  # fmt: skip
    make = helper.make_node
    nodes = [
        make("Cast", ["attention_mask"], ["mask"], to=TensorProto.BOOL),
        make("Shape", ["attention_mask"], ["b"], start=0, end=1),
        make("Squeeze", ["b"], ["batch"]),
        make("Shape", ["attention_mask"], ["t"], start=1, end=2),
        make("Squeeze", ["t"], ["tokens"]),
        make("Range", ["zero", "batch", "one"], ["counted"]),
        make("Unsqueeze", ["counted", "rows"], ["u"]),
        make("Unsqueeze", ["u", "at3"], ["lines"]),
        make("Range", ["from", "tokens", "one"], ["places"]),
        make("Unsqueeze", ["places", "first"], ["v"]),
        make("Unsqueeze", ["v", "at"], ["keys"]),
        make("Unsqueeze", ["v", "at3"], ["queries"]),
        make("Max", ["lines", "keys"], ["both"]),
        make("Shape", ["both"], ["all"]),
        make("Expand", ["lines", "all"], ["e"]),
        make("Unsqueeze", ["e", "last"], ["i"]),
        make("Expand", ["keys", "all"], ["f"]),
        make("Unsqueeze", ["f", "last"], ["j"]),
        make("Concat", ["i", "j"], ["indices"], axis=-1),
        make("GatherND", ["mask", "indices"], ["seen"]),
        make("GreaterOrEqual", ["queries", "zero"], ["always"]),
        make("And", ["always", "seen"], ["condition"]),
        make("Where", ["condition", "nothing", "lowest"], ["bias"]),
        make("Add" if added else "Mul", ["scores", "bias"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info(
            "scores", TensorProto.FLOAT, ["batch_size", 2, "sequence_length", "sequence_length"]
        ),
    ]
    constants = [numpy_helper.from_array(np.float32(value), name) for name, value in (("nothing", 0), ("lowest", -3e4))]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializer=[*one.values(), *constants],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_mask_gathered_entry_by_entry_is_the_mask() -> None:
    model = gathered()
    feeds = {"attention_mask": np.array([[1, 1, 0], [1, 0, 1]]), "scores": np.ones((2, 2, 3, 3), np.float32)}
    expected = answers(model, feeds)[0]
    assert plain_mask.run(model, {})
    np.testing.assert_array_equal(answers(model, feeds)[0], expected)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Unsqueeze", "Where", "Add"]


@pytest.mark.parametrize("other", [{"axis": 3}, {"start": 1}, {"added": False}])
def test_what_is_not_the_whole_mask_stays(other: dict[str, Any]) -> None:
    assert not plain_mask.run(gathered(**other), {})


def test_keys_of_unknown_rank_stay(tmp_path: Path) -> None:
    model = trace(load_source(make_encoder(tmp_path, "bert", "classification")), opset=17)
    for node in model.graph.node:
        if node.op_type == "Transpose" and len(node.attribute[0].ints) == 4:
            node.op_type = "Identity"
            del node.attribute[:]
    assert not turn_keys.run(model, {})
