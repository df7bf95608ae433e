"""Give initializers the names of the PyTorch parameters that they hold, so that reports speak the user's language.

The exporter stores most linear weights transposed, under names such as val_123.

Requires: initializers inside the model file (no external data).
Ensures: an initializer is called NAME only where it equals the parameter NAME bit for bit, either as it is or (from two
dimensions on) transposed; no two share a name; everything else keeps its name; the graph computes the same. Two
parameters of equal value may share one initializer, which then has the name of the first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import numpy_helper

PREFIX = "model."
"""What the traced wrapper puts before each parameter's name."""

Array = np.ndarray[Any, Any]


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same type, shape and bytes (so NaN equals itself and -0.0 differs from 0.0)."""
    return a.dtype == b.dtype and a.shape == b.shape and np.ascontiguousarray(a).tobytes() == b.tobytes()


def run(model: Any, weights: Mapping[str, Array]) -> bool:
    """Rename initializers of *model* in place."""
    renames: dict[str, str] = {}
    unnamed = []
    for tensor in model.graph.initializer:
        name = tensor.name.removeprefix(PREFIX)
        if name in weights and same_bits(numpy_helper.to_array(tensor), weights[name]):
            renames[tensor.name] = name
        elif len(tensor.dims) >= 2:
            unnamed.append(tensor)
    free = {name: weight for name, weight in weights.items() if weight.ndim >= 2 and name not in renames.values()}
    for tensor in unnamed:
        found = next(_matches(tensor, free), None)
        if found is not None:
            renames[tensor.name] = found
            del free[found]
    taken = _names(model.graph) - set(renames)
    renames = {old: new for old, new in renames.items() if old != new and new not in taken}
    rename(model.graph, renames)
    return bool(renames)


def _matches(tensor: Any, weights: Mapping[str, Array]) -> Iterator[str]:
    shape = tuple(tensor.dims)
    array = None
    for name, weight in weights.items():
        if shape not in (weight.shape, weight.shape[::-1]):
            continue
        array = numpy_helper.to_array(tensor) if array is None else array
        if same_bits(array, weight) or same_bits(array, np.ascontiguousarray(weight.T)):
            yield name


def _names(graph: Any) -> set[str]:
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    return names | {name for node in graph.node for name in (*node.input, *node.output)}


def rename(graph: Any, renames: Mapping[str, str]) -> None:
    """Rename initializers of *graph*, and what reads them, in place, subgraphs included."""
    for tensor in graph.initializer:
        tensor.name = renames.get(tensor.name, tensor.name)
    for value in (*graph.output, *graph.value_info):
        value.name = renames.get(value.name, value.name)
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in renames:
                node.input[position] = renames[name]
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                rename(subgraph, renames)
