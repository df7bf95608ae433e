"""Turn the keys of attention by one Transpose, where torch.onnx goes through two Reshapes of shapes that it computes.

    s = Shape(k);  flat = Reshape(k, [-1, s[-2:-1], s[-1:]]);  turned = Transpose(flat, [0, 2, 1])
    Reshape(turned, [s[:-2], s[-1:], s[-2:-1]])                         k (batch, heads, tokens, width)

    Transpose(k, [0, 1, 3, 2])

Runtimes know attention by its shape, which the first form hides, and computing shapes costs launches.

Requires: k comes from a Transpose with four dimensions, so that its rank is known.
Ensures: the result has the same name and the same bits; nothing reads the old chain.
"""

from collections.abc import Mapping
from typing import Any

from onnx import helper, numpy_helper

from export.passes._layout import drop_unread

_RANK = 4


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Rewrite *model* in place."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    changed = False
    for place, node in enumerate(graph.node):
        keys = _keys(node, producers, constants)
        if keys is not None:
            turned = helper.make_node("Transpose", [keys], list(node.output), name=node.name, perm=[0, 1, 3, 2])
            graph.node[place].CopyFrom(turned)
            changed = True
    if changed:
        drop_unread(graph)
    return changed


def _keys(node: Any, producers: Mapping[str, Any], constants: Mapping[str, Any]) -> str | None:
    """What the last Reshape of such a chain turns; None of any other *node*."""
    turned = producers.get(node.input[0]) if node.op_type == "Reshape" else None
    if turned is None or turned.op_type != "Transpose" or _ints(turned, "perm") != [0, 2, 1]:
        return None
    flat = producers.get(turned.input[0])
    if flat is None or flat.op_type != "Reshape":
        return None
    keys = flat.input[0]
    source = producers.get(keys)
    if source is None or source.op_type not in ("Transpose", "Concat"):
        return None
    if source.op_type == "Concat":  # a decoder's past and what it sees now
        source = producers.get(source.input[-1])
    if source is None or source.op_type != "Transpose" or len(_ints(source, "perm")) != _RANK:
        return None
    first = [_part(name, keys, producers, constants) for name in _parts(flat.input[1], producers)]
    last = [_part(name, keys, producers, constants) for name in _parts(node.input[1], producers)]
    rows, width, lead = (-2, -1), (-1, None), (None, -2)
    return str(keys) if first == ["rest", rows, width] and last == [lead, width, rows] else None


def _parts(name: str, producers: Mapping[str, Any]) -> list[str]:
    node = producers.get(name)
    return list(node.input) if node is not None and node.op_type == "Concat" else []


def _part(name: str, of: str, producers: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """``rest`` for -1, or from where to where *name* is a slice of the shape of *of*; None for anything else."""
    if name in constants:
        return "rest" if _numbers(constants[name]) == [-1] else None
    node = producers.get(name)
    if node is None or node.op_type != "Slice" or len(node.input) != 3:
        return None
    shape = producers.get(node.input[0])
    ends = [constants.get(each) for each in node.input[1:]]
    if shape is None or shape.op_type != "Shape" or shape.input[0] != of or None in ends:
        return None
    if any(entry.name == "end" or entry.i for entry in shape.attribute):
        return None
    (start,), (end,) = (_numbers(each) for each in ends)
    return (start if start >= -_RANK else None), (end if end <= _RANK else None)


def _numbers(tensor: Any) -> list[int]:
    return [int(value) for value in numpy_helper.to_array(tensor).reshape(-1)]


def _ints(node: Any, name: str) -> list[int]:
    return next((list(entry.ints) for entry in node.attribute if entry.name == name), [])
