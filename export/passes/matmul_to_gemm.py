"""Write linear layers as Gemm with transB: the weight as PyTorch stores it, outputs x inputs, and the bias inside.

    (B, S, k) --Reshape--> (B S, k) --Gemm W (n, k), b (n)--> (B S, n) --Reshape--> (B, S, n)

Gemm takes two dimensions, so activations become rows before it. What works row by row (residual sums, norms,
activation functions) goes on with rows, so that Reshape remains around attention and at the ends.

Requires: no subgraphs or local functions. Of *weights*, those that MatMul alone reads, as its second operand, with a
first one of rank 2 or 3, are rewritten; others keep their form. Activations of rank 3 that meet in a sum have the same
leading dimensions.
Ensures: each of these weights is read by Gemm with transB = 1, so that its reduction axis is 1; a bias that was added
to a layer's output alone is Gemm's third input. Inputs and outputs of the graph stay.
"""

from collections.abc import Mapping
from typing import Any

from onnx import helper, numpy_helper

from export.passes._layout import Array, Relayout, Value

_ROWWISE = frozenset({"LayerNormalization", "RMSNormalization", "ReduceMean"})


def run(model: Any, weights: Mapping[str, Array]) -> bool:
    """Rewrite *model* in place."""
    return _Rows(model, weights).run()


class _Rows(Relayout):
    """Activations as rows, (everything else, features)."""

    suffix = "_rows"

    def __init__(self, model: Any, weights: Mapping[str, Array]) -> None:
        super().__init__(model, weights)
        self.leads: dict[tuple[str | int, ...], str] = {}
        self.full: dict[tuple[str, int], str] = {}

    def stored(self, weight: Array) -> Array:
        return weight.T

    def product(self, operands: list[str], output: str, *, name: str) -> Any:
        return helper.make_node("Gemm", operands, [output], name=name, transB=1)

    def enter(self, name: str, rank: int, width: int) -> str:
        if rank == 2:
            return name
        shape = self.constant(f"rows_of_{width}", [-1, width])
        return self.node("Reshape", [name, shape], name + self.suffix)

    def leave(self, name: str, value: Value) -> None:
        if value.rank == 2:
            self.node("Identity", [value.name], name)
            return
        self.node("Reshape", [value.name, self._shape(value)], name)

    def _shape(self, value: Value) -> str:
        """The name of the plain shape of *value*: the leading dimensions of its lead, and its width."""
        dims = self.shapes[value.lead][:-1]  # a symbol stands for one number in the whole graph
        if dims not in self.leads:
            self.leads[dims] = self.node("Shape", [value.lead], f"{value.lead}_leading", start=0, end=value.rank - 1)
        lead = self.leads[dims]
        if (lead, value.width) not in self.full:
            width = self.constant(f"width_{value.width}", [value.width])
            self.full[lead, value.width] = self.node("Concat", [lead, width], f"{lead}_by_{value.width}", axis=0)
        return self.full[lead, value.width]

    def joins(self, name: str) -> bool:
        return True  # a Reshape costs nothing

    def spreads(self, name: str) -> bool:
        return len(self.constants[name].dims) < 2

    def computes(self, node: Any) -> bool:
        return self._along_the_last(node) if node.op_type in _ROWWISE else super().computes(node)

    def _along_the_last(self, node: Any) -> bool:
        """Whether a norm or a mean runs along the last axis, said in a way that means the same in two dimensions."""
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type != "ReduceMean":
            return bool(attributes.get("axis", -1) == -1)
        axes = attributes.get("axes")
        if len(node.input) > 1 and node.input[1] in self.constants:
            axes = numpy_helper.to_array(self.constants[node.input[1]]).tolist()
        return bool(axes == [-1] and attributes.get("keepdims", 1) == 1)
