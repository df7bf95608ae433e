"""Write a part of a shape as the whole shape and a Slice, for runtimes that know Shape as it was before opset 15.

torch.onnx writes Shape with start and end; TensorRT 8.6 does not look at them, and takes the whole shape.

Requires: the rank of what is asked is known wherever start or end counts from the end.
Ensures: no Shape has an attribute; each gives the same numbers under the same name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

_END = np.iinfo(np.int32).max
"""Past every rank, and still a number of the 32 bits in which TensorRT computes shapes."""


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Rewrite *model* in place."""
    graph, changed, nodes = model.graph, False, []
    constants = {tensor.name for tensor in graph.initializer}
    wholes: dict[str, str] = {}

    def constant(value: int) -> str:
        name = f"shape_from_{value}"
        if name not in constants:  # an earlier run may have left it
            constants.add(name)
            graph.initializer.append(numpy_helper.from_array(np.array([value], dtype=np.int64), name))
        return name

    for node in graph.node:
        if node.op_type == "Shape" and not node.attribute:
            wholes.setdefault(node.input[0], node.output[0])
        given = {entry.name: entry.i for entry in node.attribute} if node.op_type == "Shape" else {}
        if not given:
            nodes.append(node)
            continue
        changed = True
        del node.attribute[:]
        start, end = given.get("start", 0), given.get("end", _END)
        if (start, end) == (0, _END):
            nodes.append(node)
            continue
        source, part = node.input[0], node.output[0]
        if source not in wholes:
            wholes[source] = f"{source}_shape"
            nodes.append(helper.make_node("Shape", [source], [wholes[source]], name=wholes[source]))
        inputs = [wholes[source], constant(start), constant(end), constant(0)]
        nodes.append(helper.make_node("Slice", inputs, [part], name=node.name or part))
    if changed:
        del graph.node[:]
        graph.node.extend(nodes)
    return changed
