"""What the passes that rewrite linear layers share: activations kept in another layout for as long as that is free.

A linear layer in another form reads and writes its activations in another layout: Gemm as rows (batch * sequence,
features), Conv as an image (batch, features, sequence, 1). Written one by one, each layer would be wrapped in two
conversions. So a value is known in up to two layouts, "plain" as the exporter made it and "other"; a conversion is
written when somebody reads the layout that is not there yet, once. Operators that work entry by entry compute in
whatever layout their inputs have, so that conversions around an activation function never come to be.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.large import infer_values
from pst.errors import ModelError

Array = np.ndarray[Any, Any]
ENTRYWISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity",
     "LeakyRelu", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh"}
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Value:
    """An activation in the other layout."""

    name: str
    lead: str
    """Of the tensor in the plain layout whose dimensions but the last one it has."""
    rank: int
    """Of the plain layout."""
    width: int
    """Size of the plain layout's last dimension."""


class Relayout(ABC):
    """One rewrite of a graph. Subclasses say what the form of a layer is, and how to get to its layout and back."""

    suffix: str
    """What the name of a value in the other layout ends in."""

    def __init__(self, model: Any, weights: Mapping[str, Array]) -> None:
        """For *model* (onnx.ModelProto without subgraphs) and the *weights* whose layers change their form."""
        self.graph = model.graph
        if model.functions or any(entry.HasField("g") for node in self.graph.node for entry in node.attribute):
            raise ModelError("The graph holds subgraphs, whose layers keep their form; use --linear-form auto.")
        self.shapes = infer_shapes(model)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.targets = {name for name in weights if self._is_target(name)}
        self.other: dict[str, Value] = {}
        self.native: set[str] = set()
        """Plain names of values that exist in the other layout alone so far."""
        self.folded: set[str] = set()
        """Outputs of nodes that another one computes as well."""
        self.nodes: list[Any] = []

    @abstractmethod
    def stored(self, weight: Array) -> Array:
        """The (inputs, outputs) weight of a MatMul as this form stores it."""

    @abstractmethod
    def enter(self, name: str, rank: int, width: int) -> str:
        """Write the conversion of a plain value to the other layout; the name of the result."""

    @abstractmethod
    def leave(self, name: str, value: Value) -> None:
        """Write the conversion of *value* to the plain layout, under the plain *name*."""

    def computes(self, node: Any) -> bool:
        """Whether *node*, all of whose values are in the other layout, means the same there."""
        constants = [name for name in node.input if name in self.constants]
        return node.op_type in ENTRYWISE and all(self.spreads(name) for name in constants)

    @abstractmethod
    def spreads(self, name: str) -> bool:
        """Whether the constant *name* meets an activation in both layouts alike."""

    def joins(self, name: str) -> bool:
        """Whether a plain value may be converted only so that an operator can compute in the other layout."""
        return name in self.other

    def rewrite_other(self, node: Any) -> bool:
        """Write *node* in a way of the form's own, and say so; here there is none."""
        return False

    def run(self) -> bool:
        """Rewrite the graph in place; whether there was anything to rewrite."""
        if not self.targets:
            return False
        for node in self.graph.node:
            if node.output[0] in self.folded:
                continue
            if node.op_type == "MatMul" and node.input[1] in self.targets:
                self._linear(node)
            elif not self.rewrite_other(node) and not self._compute_in_other(node):
                for name in node.input:
                    self.plain(name)
                self.nodes.append(node)
        for value in self.graph.output:
            self.plain(value.name)
        for name in self.targets:
            array = np.ascontiguousarray(self.stored(numpy_helper.to_array(self.constants[name])))
            self.constants[name].CopyFrom(numpy_helper.from_array(array, name))
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        drop_unread(self.graph)
        return True

    def _is_target(self, name: str) -> bool:
        """Whether every reader of the weight *name* is a MatMul whose other operand can be converted."""
        if name not in self.constants or name in self.outputs or len(self.constants[name].dims) != 2:
            return False
        return all(
            node.op_type == "MatMul" and node.input[1] == name and len(self.shapes.get(node.input[0], ())) in (2, 3)
            for node in self.readers.get(name, [])
        )

    def _linear(self, node: Any) -> None:
        source, weight = node.input
        rank, (inputs, outputs) = len(self.shapes[source]), self.constants[weight].dims
        read, made = self.in_other(source, rank, inputs), node.output[0]
        operands = [read.name, weight]
        bias = self._bias(made, outputs)
        if bias is not None:
            operands.append(bias[0])
            made = bias[1]
            self.folded.add(made)
        value = replace(read, name=made + self.suffix, width=int(outputs))
        self.nodes.append(self.product(operands, value.name, name=node.name))
        self.other[made] = value
        self.native.add(made)

    @abstractmethod
    def product(self, operands: list[str], output: str, *, name: str) -> Any:
        """The node of a layer: *operands* are activations, weight and, where there is one, bias."""

    def _bias(self, made: str, outputs: int) -> tuple[str, str] | None:
        """The bias that is added to *made* and nothing else done with it, and the name of the sum."""
        readers = self.readers.get(made, [])
        if len(readers) != 1 or made in self.outputs or readers[0].op_type != "Add":
            return None
        bias = next((name for name in readers[0].input if name != made), made)
        fits = bias in self.constants and list(self.constants[bias].dims) == [outputs]
        return (bias, readers[0].output[0]) if fits else None

    def in_other(self, name: str, rank: int, width: int) -> Value:
        """The plain value *name* in the other layout, converted if need be."""
        if name not in self.other:
            self.other[name] = Value(name=self.enter(name, rank, width), lead=name, rank=rank, width=width)
        return self.other[name]

    def plain(self, name: str) -> None:
        """Make sure that *name* exists in the plain layout."""
        if name in self.native:
            self.native.remove(name)
            self.leave(name, self.other[name])

    def _compute_in_other(self, node: Any) -> bool:
        """Write *node* in the other layout, where one of its inputs is there alone and the others can follow."""
        inputs = [name for name in node.input if name and name not in self.constants]
        shape = self.shapes.get(node.output[0], ())
        if not self.native & set(inputs) or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return False
        if not shape or not isinstance(shape[-1], int) or not self.computes(node):
            return False
        values = [self.other.get(name) for name in inputs]
        known = next(value for value in values if value is not None)
        for name, value in zip(inputs, values, strict=True):
            same = value is not None and value.lead == known.lead
            if not same and not (self._alike(name, known) and self.joins(name)):
                return False
        inside = {name: self.in_other(name, known.rank, int(self.shapes[name][-1])).name for name in inputs}
        made = node.output[0]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.output[0] = made + self.suffix
        for place, name in enumerate(node.input):
            copy.input[place] = inside.get(name, name)
        self.nodes.append(copy)
        self.other[made] = replace(known, name=copy.output[0], width=int(shape[-1]))
        self.native.add(made)
        return True

    def _alike(self, name: str, known: Value) -> bool:
        """Whether *name* has the dimensions of *known*, the last one aside, as far as can be told.

        Two activations (batch, sequence, features) meet in a residual connection; one of which a dimension is known to
        be 1 would be spread over the other. What cannot be told here, the comparison with PyTorch tells.
        """
        shape, lead = self.shapes.get(name, ()), self.shapes[known.lead]
        return (
            len(shape) == known.rank
            and isinstance(shape[-1], int)
            and all(size != 1 for size in (*shape[:-1], *lead[:-1]))
        )

    def constant(self, name: str, values: list[int]) -> str:
        """An int64 vector among the initializers; its name."""
        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
            self.constants[name] = self.graph.initializer[-1]
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Write a node of one output; the name of that."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}_{op}", **attributes))
        return output


def infer_shapes(model: Any) -> dict[str, tuple[str | int, ...]]:
    """The shapes that are known; the names of symbolic dimensions are those of the inference."""
    return {
        value.name: tuple(dim.dim_param or int(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        for value in infer_values(model)
    }


def drop_unread(graph: Any) -> None:
    """Remove nodes that nobody reads, then initializers, in place."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read & set(node.output):
            kept.append(node)
            read |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in read:
            del graph.initializer[position]
