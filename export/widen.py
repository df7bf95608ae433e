"""A copy of a half graph that shows its rounding in ONNX Runtime on the CPU.

There the runtime has no arithmetic in bf16, and computes much of fp16 in float32 without rounding in between. In the
copy each operator computes in float32 and its result is rounded: what a GPU does, whose matrix units add up in float32.
"""

from typing import Any

from onnx import TensorProto, helper

from export.large import copied, infer_values

_FREE = frozenset({"Cast", "Shape"})


def widen(model: Any, half: int) -> Any:
    """A copy of *model* (onnx.ModelProto) whose inputs and outputs are float32 where they were *half*, an ONNX type."""
    wide = copied(model)
    graph = wide.graph
    narrow = {value.name for value in infer_values(model) if value.type.tensor_type.elem_type == half}
    narrow |= {tensor.name for tensor in graph.initializer if tensor.data_type == half}
    nodes: list[Any] = []

    def cast(source: str, target: str, to: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], to=to))

    renamed = {value.name: f"{value.name}_narrow" for value in (*graph.input, *graph.output) if value.name in narrow}
    for value in graph.input:
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            cast(value.name, renamed[value.name], half)
    for place, node in enumerate(graph.node):
        inputs = [renamed.get(name, name) for name in node.input]
        outputs = [renamed.get(name, name) for name in node.output]
        if node.op_type not in _FREE:
            for index, name in enumerate(node.input):
                if name in narrow:
                    cast(inputs[index], f"wide_{place}_{index}", TensorProto.FLOAT)
                    inputs[index] = f"wide_{place}_{index}"
            wide_outputs = [
                f"wide_{place}_out_{i}" if name in narrow else outputs[i] for i, name in enumerate(node.output)
            ]
        else:
            wide_outputs = outputs
        nodes.append(helper.make_node(node.op_type, inputs, wide_outputs, name=node.name, domain=node.domain))
        nodes[-1].attribute.extend(node.attribute)
        for source, target in zip(wide_outputs, outputs, strict=True):
            if source != target:
                cast(source, target, half)
    for value in graph.output:
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            cast(renamed[value.name], value.name, TensorProto.FLOAT)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.ClearField("value_info")
    return wide
