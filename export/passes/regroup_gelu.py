"""Write GELU in the order of products that ONNX Runtime knows, so that it runs as one operator.

torch.onnx writes x * (0.5 * (1 + erf(x / sqrt(2)))); ONNX Runtime fuses (x * (1 + erf(x / sqrt(2)))) * 0.5 alone.

Requires: initializers inside the model file (no external data).
Ensures: each product of the first form, whose inner product nobody else reads, has the second one; names and the number
of nodes stay. A product with 0.5 is exact, so that the graph computes the same bits (but for numbers below 1e-37).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from onnx import numpy_helper


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Regroup the products of *model* in place."""
    graph, changed = model.graph, False
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    for node in graph.node:
        if node.op_type != "Mul":
            continue
        for place, name in enumerate(node.input):
            inner, other = makers.get(name), node.input[1 - place]
            if inner is None or inner.op_type != "Mul" or readers[name] != 1:
                continue
            half = next((each for each in inner.input if each in tensors and _is_half(tensors[each])), None)
            sums = [each for each in inner.input if each in makers and _adds_erf(makers[each], makers)]
            if half is not None and len(sums) == 1:
                inner.input[:], node.input[:] = [other, sums[0]], [name, half]
                changed = True
                break
    return changed


def _is_half(tensor: Any) -> bool:
    return not tensor.dims and float(numpy_helper.to_array(tensor)) == 0.5


def _adds_erf(node: Any, makers: Mapping[str, Any]) -> bool:
    return node.op_type == "Add" and any(name in makers and makers[name].op_type == "Erf" for name in node.input)
