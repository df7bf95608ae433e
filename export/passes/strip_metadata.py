"""Remove what the exporter writes for people who debug it: stack traces, file paths, module names, doc strings.

Requires: nothing.
Ensures: no doc_string and no metadata_props remain anywhere in the model, and no value_info (intermediate shapes,
which every runtime infers again); so equal models give equal bytes, wherever they were exported. What the graph
computes is untouched.
"""

from collections.abc import Mapping
from typing import Any


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Strip *model* in place."""
    before = model.ByteSize()
    _clear(model)
    _strip_graph(model.graph)
    for function in model.functions:
        _clear(function)
        for node in function.node:
            _strip_node(node)
    return bool(model.ByteSize() != before)


def _clear(message: Any) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    for field in ("doc_string", "metadata_props"):
        if field in fields:
            message.ClearField(field)


def _strip_graph(graph: Any) -> None:
    _clear(graph)
    graph.ClearField("value_info")
    for message in (*graph.input, *graph.output, *graph.initializer):
        _clear(message)
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: Any) -> None:
    _clear(node)
    for attribute in node.attribute:
        _clear(attribute)
        for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            _strip_graph(subgraph)
