"""Write the mask of padding as what it is: the attention mask with two dimensions more.

    at = Concat(Expand(rows), Expand(places));  GatherND(mask, at)        rows 0 ... batch, places 0 ... tokens
    And(And(True, places >= 0), gathered)

    Unsqueeze(mask, [1, 2])

torch.onnx gathers each entry of the mask at its own place, and combines the result with conditions that always hold.
Runtimes take that at its word: indices for every pair of tokens, in several kernels.

Requires: the mask is the graph's input of two dimensions, cast or not, and what the condition decides is added to
scores by broadcasting, so that it need not have a row for each query.
Ensures: the same condition for each pair of row and key; nothing reads the old nodes. Conditions that depend on the
query, such as a decoder's, stay.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from export.passes._layout import drop_unread

_AXES = "mask_axes"


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Rewrite *model* in place."""
    graph = model.graph
    view = _View(graph)
    changed = False
    for node in [node for node in graph.node if node.op_type == "Where" and view.is_added(node)]:
        parts = list(view.conditions(node.input[0]))
        if len(parts) < 2 or any(kind == "other" for kind, _ in parts):
            continue
        masks = [source for kind, source in parts if kind == "padding"]
        if len(masks) != 1:
            continue
        if not changed:
            graph.initializer.append(numpy_helper.from_array(np.array([1, 2], dtype=np.int64), _AXES))
        name = f"{node.output[0]}_seen"
        place = next(at for at, each in enumerate(graph.node) if each.output == node.output)
        graph.node.insert(place, helper.make_node("Unsqueeze", [masks[0], _AXES], [name], name=name))
        graph.node[place + 1].input[0] = name
        changed = True
    if changed:
        drop_unread(graph)
    return changed


class _View:
    """Where the values of a graph come from."""

    def __init__(self, graph: Any) -> None:
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if _small(tensor)}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.outputs = {value.name for value in graph.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.inputs = {
            value.name: [dimension.dim_param for dimension in value.type.tensor_type.shape.dim] for value in graph.input
        }

    def is_added(self, node: Any) -> bool:
        """Whether the scalars that a Where chooses from are added to something, and read by nothing else."""
        if any(name not in self.constants or self.constants[name].size != 1 for name in node.input[1:]):
            return False
        readers = self.readers.get(node.output[0], [])
        return node.output[0] not in self.outputs and bool(readers) and all(one.op_type == "Add" for one in readers)

    def conditions(self, name: str) -> Iterator[tuple[str, str]]:
        """What *name* is the And of: ``all`` for what always holds, ``padding`` with its mask, or ``other``."""
        node = self.producers.get(name)
        if node is not None and node.op_type == "And":
            for part in node.input:
                yield from self.conditions(part)
        elif name in self.constants and self.constants[name].all():
            yield "all", ""
        elif node is not None and node.op_type == "GreaterOrEqual" and self._is_zero(node.input[1]):
            yield ("all" if self._range(node.input[0]) is not None else "other"), ""
        elif node is not None and node.op_type == "GatherND" and self._gathers_all(node):
            yield "padding", node.input[0]
        else:
            yield "other", ""

    def _is_zero(self, name: str) -> bool:
        return name in self.constants and not self.constants[name].any()

    def _gathers_all(self, node: Any) -> bool:
        """Whether the indices are every row and every place of the mask, rows first."""
        mask, joined = self.producers.get(node.input[0]), self.producers.get(node.input[1])
        symbols = self.inputs.get(mask.input[0] if mask is not None and mask.op_type == "Cast" else node.input[0])
        if symbols is None or len(symbols) != 2 or joined is None or joined.op_type != "Concat":
            return False
        if any(entry.name == "batch_dims" and entry.i for entry in node.attribute):
            return False
        counted = [self._range(self._expanded(name)) for name in joined.input]
        return counted == [(symbols[0], 0), (symbols[1], 3)]

    def _expanded(self, name: str) -> str:
        """What Unsqueeze(Expand(x)) is made of; empty where it is something else."""
        outer = self.producers.get(name)
        inner = self.producers.get(outer.input[0]) if outer is not None and outer.op_type == "Unsqueeze" else None
        return str(inner.input[0]) if inner is not None and inner.op_type == "Expand" else ""

    def _range(self, name: str) -> tuple[str, int] | None:
        """Of 0, 1, ... n - 1: the symbol of n, and along which of four dimensions they lie. None for anything else."""
        axes, node = [], self.producers.get(name)
        while node is not None and node.op_type == "Unsqueeze" and node.input[1] in self.constants:
            axes.append([int(axis) for axis in self.constants[node.input[1]]])
            node = self.producers.get(node.input[0])
        if node is None or node.op_type != "Range" or not self._is_zero(node.input[0]):
            return None
        if node.input[2] not in self.constants or int(self.constants[node.input[2]]) != 1:
            return None
        place, rank = 0, 1
        for each in reversed(axes):
            rank += len(each)
            for axis in sorted(axis % rank for axis in each):
                place += axis <= place
        return (self._symbol(node.input[1]), place) if rank == 4 else None

    def _symbol(self, name: str) -> str:
        """The symbol of a graph input's dimension that *name* is the size of, a scalar; empty for anything else."""
        node = self.producers.get(name)
        node = self.producers.get(node.input[0]) if node is not None and node.op_type == "Squeeze" else None
        if node is None or node.op_type != "Shape":
            return ""
        symbols, given = self.inputs.get(node.input[0], []), {entry.name: entry.i for entry in node.attribute}
        start, end = given.get("start", 0), given.get("end", len(symbols))
        return symbols[start] if end == start + 1 and start < len(symbols) else ""


def _small(tensor: Any) -> bool:
    return int(np.prod(tensor.dims)) <= 16
