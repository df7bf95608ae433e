"""Write linear layers as 1x1 convolutions, the only form that TensorRT 8.6 takes for its sparse kernels.

    (B, S, k) --Unsqueeze, Transpose--> (B, k, S, 1) --Conv W (n, k, 1, 1), b (n)--> (B, n, S, 1) --back--> (B, S, n)

A convolution wants the features in front of the sequence, which no other operator of a transformer does. Activation
functions compute on the image, so that nothing is transposed inside a feed-forward layer; and the Transpose of
attention, which brings the heads in front, takes its image as it is, so that queries, keys, values and the context cost
nothing more. Two transposes remain for each half of a layer: before its first product and after its last one.

Requires: no subgraphs or local functions. Of *weights*, those that MatMul alone reads, as its second operand, with a
first one of rank 2 or 3, are rewritten; others keep their form. Activations of rank 3 that meet in a sum have the same
leading dimensions; heads are split by a Reshape from (B, S, h d) to (B, S, h, d) with a Transpose (0, 2, 1, 3) after
it, and joined by the reverse.
Ensures: each of these weights is read by Conv as (n, k, 1, 1), so that its reduction axis is 1; a bias that was added
to a layer's output alone is Conv's third input. Inputs and outputs of the graph stay.
"""

from collections.abc import Mapping
from typing import Any

from onnx import helper

from export.passes._layout import Array, Relayout, Value

_HEADS_FIRST = [0, 2, 1, 3]
_KEYS_LAST = [0, 1, 3, 2]


def run(model: Any, weights: Mapping[str, Array]) -> bool:
    """Rewrite *model* in place."""
    return _Images(model, weights).run()


class _Images(Relayout):
    """Activations as images: (batch, features, sequence, 1)."""

    suffix = "_image"

    def __init__(self, model: Any, weights: Mapping[str, Array]) -> None:
        super().__init__(model, weights)
        self.split: dict[str, str] = {}
        """Of the output of a Reshape that splits heads, where only a Transpose reads it: (B, h, d, S)."""

    def stored(self, weight: Array) -> Array:
        return weight.T[:, :, None, None]

    def product(self, operands: list[str], output: str, *, name: str) -> Any:
        return helper.make_node("Conv", operands, [output], name=name, kernel_shape=[1, 1])

    def enter(self, name: str, rank: int, width: int) -> str:
        heads = self._joined_heads(name, width)
        if heads is not None:
            self.plain(heads)
            turned = self.node("Transpose", [heads], name + "_turned", perm=_KEYS_LAST)  # (B, h, d, S)
            shape = self.constant(f"image_of_{width}", [0, width, -1, 1])
            return self.node("Reshape", [turned, shape], name + self.suffix)
        deep = self.node("Unsqueeze", [name, self._added(rank)], name + "_deep")  # (B, S, k, 1)
        return self.node("Transpose", [deep], name + self.suffix, perm=_HEADS_FIRST)

    def leave(self, name: str, value: Value) -> None:
        deep = self.node("Transpose", [value.name], name + "_flat", perm=_HEADS_FIRST)
        self.node("Squeeze", [deep, self._added(value.rank)], name)

    def _added(self, rank: int) -> str:
        return self.constant("image_axis", [3]) if rank == 3 else self.constant("image_axes", [0, 3])

    def spreads(self, name: str) -> bool:
        dims = self.constants[name].dims
        return len(dims) < 2 and list(dims) in ([], [1])

    def rewrite_other(self, node: Any) -> bool:
        made = node.output[0]
        if node.op_type == "Transpose" and node.input[0] in self.split:
            self.node("Transpose", [self.split[node.input[0]]], made, perm=_KEYS_LAST)
            return True
        if node.op_type != "Reshape" or node.input[0] not in self.native:
            return False
        value, shape, readers = self.other[node.input[0]], self.shapes.get(made, ()), self.readers.get(made, [])
        if len(shape) != 4 or not isinstance(shape[-1], int) or value.width % shape[-1] or value.rank != 3:
            return False
        if made in self.outputs or not readers or not all(_turns(reader, _HEADS_FIRST) for reader in readers):
            return False
        heads = self.constant(f"heads_of_{value.width}_{shape[-1]}", [0, value.width // shape[-1], shape[-1], -1])
        self.split[made] = self.node("Reshape", [value.name, heads], made + self.suffix)
        return True

    def _joined_heads(self, name: str, width: int) -> str | None:
        """(B, h, S, d), where *name* is (B, S, h d) made of it by a Transpose and a Reshape."""
        joined = self.producers.get(name)
        if joined is None or joined.op_type != "Reshape" or len(self.shapes[name]) != 3:
            return None
        turned = self.producers.get(joined.input[0])
        shape = self.shapes.get(joined.input[0], ())
        if turned is None or not _turns(turned, _HEADS_FIRST) or len(shape) != 4 or turned.input[0] in self.split:
            return None
        return turned.input[0] if isinstance(shape[-1], int) and width % shape[-1] == 0 else None


def _turns(node: Any, perm: list[int]) -> bool:
    found = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), None)
    return bool(node.op_type == "Transpose" and found == perm)
