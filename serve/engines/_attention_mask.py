"""What a mask of attention is made of, read from the nodes that torch.onnx writes for it."""

from collections.abc import Iterator

from serve.engines._graph_view import DiffersError, GraphView

_EXCLUDES = -1e4
"""A number that low, added to a score, leaves a token no weight that float32 or float16 would tell from 0."""


def mask_parts(graph: GraphView, name: str) -> Iterator[str]:
    """What a mask that is added to scores is made of: ``all``, ``padding``, ``causal`` or ``unknown``."""
    node = graph.producers.get(graph.past_cast(name))
    try:
        if node is not None and node.op_type == "Where" and not graph.constant(node.input[1]).any():
            excludes = float(graph.constant(node.input[2])) <= _EXCLUDES
            yield from _condition_parts(graph, node.input[0]) if excludes else ("unknown",)
        else:
            yield "unknown"
    except DiffersError:
        yield "unknown"


def _condition_parts(graph: GraphView, name: str) -> Iterator[str]:
    if name in graph.initializers:
        yield "all" if graph.constant(name).all() else "unknown"
        return
    node = graph.made_by(name, "And", "Expand", "GreaterOrEqual", "LessOrEqual", "GatherND", "Unsqueeze")
    operator = node.op_type
    if operator == "And":
        for part in node.input:
            yield from _condition_parts(graph, part)
    elif operator == "Expand":
        yield from _condition_parts(graph, node.input[0])
    elif operator == "GreaterOrEqual" and _counts(graph, node.input[0]) and not graph.constant(node.input[1]).any():
        yield "all"
    elif operator == "LessOrEqual" and _counts(graph, node.input[0]) and _counts(graph, node.input[1]):
        yield "causal"
    elif operator in ("GatherND", "Unsqueeze") and _is_mask(graph, node.input[0]):
        yield "padding"
    else:
        yield "unknown"


def _counts(graph: GraphView, name: str) -> bool:
    """Whether these are the places 0, 1, 2 ... of tokens, or those after a past."""
    node = graph.producers.get(name)
    if node is None or node.op_type not in ("Unsqueeze", "Add", "Range"):
        return False
    return bool(node.op_type == "Range" or _counts(graph, node.input[0]))


def _is_mask(graph: GraphView, name: str) -> bool:
    node = graph.producers.get(name)
    if node is None:
        return name == "attention_mask"
    return node.op_type in ("Cast", "Reshape") and _is_mask(graph, node.input[0])
