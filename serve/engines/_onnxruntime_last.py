"""A decoder that scores the last token alone: its head, a third of a prompt's work in GPT-2, reads one row per text."""

from typing import Any

import numpy as np

_LARGEST = np.iinfo(np.int64).max


def keep_last(model: Any, output: str) -> bool:
    """Rewrite *model* (onnx.ModelProto) so that *output* is (batch, 1, n) in place of (batch, tokens, n).

    Requires: *output* is a product of (batch, tokens, width) and a matrix. Whether that is so, and the model changed.
    """
    import onnx

    product = next((node for node in model.graph.node if output in node.output), None)
    if product is None or product.op_type != "MatMul":
        return False
    ends = {"start": -1, "end": _LARGEST, "axis": 1}
    for name, number in ends.items():
        tensor = onnx.numpy_helper.from_array(np.array([number], dtype=np.int64), f"last_token_{name}")
        model.graph.initializer.append(tensor)
    node = onnx.helper.make_node(
        "Slice", [product.input[0], *(f"last_token_{name}" for name in ends)], ["last_token"], name="last_token"
    )
    product.input[0] = "last_token"
    place = next(at for at, other in enumerate(model.graph.node) if other == product)
    nodes = list(model.graph.node)
    nodes.insert(place, node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in model.graph.output:
        if value.name == output and len(value.type.tensor_type.shape.dim) > 1:
            value.type.tensor_type.shape.dim[1].dim_value = 1
    return True
