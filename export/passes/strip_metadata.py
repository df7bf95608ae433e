"""Remove what the exporter writes for people who debug it: stack traces, file paths, module names, doc strings.

Requires: nothing.
Ensures: no doc_string and no metadata_props remain anywhere in the model, and no value_info (intermediate shapes,
which every runtime infers again); so equal models give equal bytes, wherever they were exported. What the graph
computes is untouched.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Strip *model* in place."""
    found = [_clear(model), _strip_graph(model.graph)]
    for function in model.functions:
        found += [_clear(function), *(_strip_node(node) for node in function.node)]
    return any(found)


def _clear(message: Any, fields: Sequence[str] = ("doc_string", "metadata_props")) -> bool:
    """Whether any of *fields* was there. The message's size would tell, too, but not above 2 GB."""
    known = [field for field in fields if field in message.DESCRIPTOR.fields_by_name]
    found = any(len(getattr(message, field)) for field in known)
    for field in known:
        message.ClearField(field)
    return found


def _strip_graph(graph: Any) -> bool:
    messages = (*graph.input, *graph.output, *graph.initializer)
    found = [_clear(graph), _clear(graph, ("value_info",)), *map(_clear, messages), *map(_strip_node, graph.node)]
    return any(found)


def _strip_node(node: Any) -> bool:
    found = [_clear(node)]
    for attribute in node.attribute:
        found.append(_clear(attribute))
        subgraphs = (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
        found += map(_strip_graph, subgraphs)
    return any(found)
