"""Models above 2 GB, which no protobuf message can be serialized with: what may look at one, and how."""

import onnx
import pytest
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from export.large import copied, infer_values
from export.passes import strip_metadata
from tests.export.conftest import Artifact

OUTPUTS = 135_000_000


@pytest.fixture(scope="module")
def large() -> onnx.ModelProto:
    """X (batch, 4) times W (4, OUTPUTS), whose 2.16 GB are zeros."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["X", "W"], ["H"]), helper.make_node("Tanh", ["H"], ["Y"])],
        "large",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    tensor = model.graph.initializer.add(name="W", data_type=TensorProto.FLOAT, dims=[4, OUTPUTS], doc_string="of whom")
    tensor.raw_data = bytes(4 * 4 * OUTPUTS)
    with pytest.raises(EncodeError):
        model.SerializeToString()
    return model


def test_shapes_are_inferred(large: onnx.ModelProto) -> None:
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in infer_values(large)
    }
    assert shapes == {"X": ["batch", 4], "W": [4, OUTPUTS], "H": ["batch", OUTPUTS], "Y": ["batch", OUTPUTS]}
    assert [value.name for value in large.graph.input] == ["X"]


def test_metadata_is_stripped(large: onnx.ModelProto) -> None:
    assert strip_metadata.run(large, {})
    assert not large.graph.initializer[0].doc_string
    assert not strip_metadata.run(large, {})


def test_a_copy_of_a_real_model_has_its_bytes(artifact: Artifact) -> None:
    model = onnx.load(artifact("2:4", 0.5) / "model.onnx")
    assert copied(model).SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_a_copy_is_the_same_and_its_own(large: onnx.ModelProto) -> None:
    copy = copied(large)
    (mine,), (theirs,) = large.graph.initializer, copy.graph.initializer
    assert (theirs.name, theirs.dims, len(theirs.raw_data)) == (mine.name, mine.dims, 16 * OUTPUTS)
    copy.graph.node[0].name = theirs.name = "other"
    theirs.ClearField("raw_data")
    assert (large.graph.node[0].name, mine.name, len(mine.raw_data)) == ("", "W", 16 * OUTPUTS)
