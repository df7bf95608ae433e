"""What is added to the scores of attention, in the form that the operators of ONNX Runtime take.

That is (batch or 1, heads or 1, tokens, past and tokens), of the operator's type. Layers that add the same share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve.engines._graph_view import GraphView

_QUERY_AXIS = 2


@dataclass(kw_only=True)
class Biases:
    """The biases of one graph, as they come to be needed."""

    graph: GraphView
    types: dict[str, int]
    """ONNX's element types by value."""
    shapes: dict[str, list[int]]
    """By value, where known: the lengths, 0 for one that varies."""
    _made: dict[tuple[str, ...], str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: GraphView, model: Any) -> "Biases":
        """For *graph*, that of *model* (onnx.ModelProto)."""
        inferred = graph.onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.input, *inferred.output)
        kinds = {value.name: value.type.tensor_type for value in values}
        types = {name: kind.elem_type for name, kind in kinds.items()}
        types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        shapes = {
            name: [dim.dim_value for dim in kind.shape.dim] for name, kind in kinds.items() if kind.HasField("shape")
        }
        return cls(graph=graph, types=types, shapes=shapes)

    def bias(self, parts: Sequence[str], *, like: str) -> tuple[str, list[Any]]:
        """The sum of *parts*, and the nodes that are new; an empty name for no parts.

        *like*: (batch, tokens, n), whose type and number of tokens the bias gets.
        """
        nodes: list[Any] = []
        if not parts:
            return "", nodes
        total = parts[0]
        for part in parts[1:]:
            total = self._node(nodes, "Add", total, part)
        if all(self.shapes.get(part, [])[_QUERY_AXIS : _QUERY_AXIS + 1] == [1] for part in parts):
            total = self._node(nodes, "Expand", total, self._one_row_per_token(nodes, like))
        if self.types.get(total) != self.types[like]:
            total = self._node(nodes, "Cast", total, to=self.types[like])
        return total, nodes

    def _one_row_per_token(self, nodes: list[Any], like: str) -> str:
        """The shape (1, 1, tokens, 1), which what is expanded to it keeps its other lengths in."""
        if ("tokens",) in self._made:  # every layer reads as many
            return self._made["tokens",]
        for name, number in (("one", 1), ("axis", 1)):
            array = np.array([number], dtype=np.int64)
            self.graph.graph.initializer.append(self.graph.onnx.numpy_helper.from_array(array, f"bias_{name}"))
        tokens = self._node(nodes, "Gather", self._node(nodes, "Shape", like), "bias_axis", axis=0)
        self._made["tokens",] = self._node(nodes, "Concat", "bias_one", "bias_one", tokens, "bias_one", axis=0)
        return self._made["tokens",]

    def _node(self, nodes: list[Any], operator: str, *inputs: str, **options: int) -> str:
        key = (operator, *inputs, *(f"{name}={value}" for name, value in options.items()))
        if key not in self._made:
            name = self._made[key] = f"bias_{operator.lower()}_{len(self._made)}"
            nodes.append(self.graph.onnx.helper.make_node(operator, list(inputs), [name], name=name, **options))
            self.types[name] = options.get("to", self.types.get(inputs[0], 0))
        return self._made[key]
