"""Copies and shape inference of models of any size: protobuf serializes a message for both, which ends at 2 GB."""

from typing import Any

import numpy as np
import onnx
from onnx import helper

_SMALL = 1024
"""Numbers of a constant that may be a shape, whose values count; of a larger one only type and shape do."""


def infer_values(model: Any) -> list[Any]:
    """Types and shapes (onnx.ValueInfoProto) of inputs, outputs, large initializers, and all that is in between.

    *model* is an onnx.ModelProto, which stays as it is. Raises what onnx's strict inference raises.
    """
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    for field in ("node", "input", "output"):
        getattr(light.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) > _SMALL:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            light.graph.initializer.append(tensor)
    graph = onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph
    return [*graph.input, *graph.output, *graph.value_info]


def copied(model: Any) -> Any:
    """A copy of an onnx.ModelProto, tensor by tensor."""
    copy = onnx.ModelProto()
    _copy(model, copy, but="graph")
    _copy(model.graph, copy.graph, but="initializer")
    for tensor in model.graph.initializer:
        mine = copy.graph.initializer.add()
        _copy(tensor, mine, but="raw_data")
        if tensor.HasField("raw_data"):
            mine.raw_data = tensor.raw_data
    return copy


def _copy(source: Any, target: Any, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
