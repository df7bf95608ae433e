"""fp16 and bf16 as types in the graph: who computes in half precision, who in float32, and what is stored.

The rule, called "half products", is much like that of torch.autocast:

- Matrices that are parameters are stored in the half type, and products (MatMul, Gemm, Conv) compute in it. What comes
  from integers alone (masks, rotary angles) stays float32.
- LayerNormalization, the operators that RMS norms are made of, and Softmax compute in float32; so does the product that
  gives the head's output, with all that follows it. The head's outputs are float32.
- Arithmetic where both types meet computes in float32, and so does every sum of two computed values: the residual
  stream, which in bf16 would cost a decoder of 30 layers nearly four times the error. Constants, vectors and biases
  follow what they meet.
- What only moves numbers keeps their type, and the key/value cache of a decoder is of the half type, in and out.

With the residual stream in half as well, sums of two computed values and LayerNormalization keep the half type where
what they read has it. A LayerNormalization takes mean and variance in float32 all the same (its stash_type). That is
what runtimes for GPUs fuse best: sum, bias and normalization are one kernel, which reads and writes half as much.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from export.large import infer_values
from pst.errors import ArtifactError, ConfigError, ModelError

Array = np.ndarray[Any, Any]
_LARGEST = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.3895314e38}  # the largest finite numbers
PRECISIONS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
              "int8": TensorProto.INT8}  # fmt: skip
"""What weights are stored in; int8 is export/quantize.py's."""
RESIDUALS = ("fp32", "half")
"""Types of the residual stream: float32 whatever the precision, or the half type of it."""
TOLERANCES = {"fp32": (1e-4, 1e-3), "fp16": (1e-1, 2e-2), "bf16": (1.0, 5e-2), "int8": (2.0, 5e-2)}
"""atol and rtol of the comparison with PyTorch in float32; bf16 keeps 8 bits of a number, fp16 11, int8 7 or 8 of the
largest number of a tensor.

Among many outputs of a half type one always lies far off, where an outlier among the activations was rounded, and in
PyTorch too. So there MEAN_SHARE counts as well, and the float32 graph is held to its own tolerance before it is
rewritten.
"""
MEAN_SHARE = 0.1
"""Of atol: the root mean square of the differences that a half type may have, and int8 on text, in the same unit."""
IN_FLOAT32 = frozenset({"LayerNormalization", "Softmax", "Pow", "ReduceMean", "Sqrt", "Reciprocal"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_MOVES = frozenset(
    {"Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "GatherND", "GatherElements", "Reshape", "Identity",
     "Transpose", "Concat", "Expand"}
)  # fmt: skip


def check_precision(precision: str) -> None:
    """Raise ConfigError for a name that is not one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ConfigError(f"Unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}.")


def check_residual(residual: str, *, precision: str) -> None:
    """Raise ConfigError for a type of the residual stream that is none of RESIDUALS, or that *precision* has not."""
    if residual not in RESIDUALS:
        raise ConfigError(f"Unknown type {residual!r} of the residual stream; use one of {', '.join(RESIDUALS)}.")
    if residual == "half" and precision not in ("fp16", "bf16"):
        raise ConfigError(f"A residual stream in half needs a half type; use --precision fp16, not {precision}.")


def to_precision(
    model: Any,
    weights: Mapping[str, Array],
    *,
    precision: str,
    outputs: Iterable[str],
    halved: Iterable[str] = (),
    residual: str = "fp32",
) -> dict[str, Array]:
    """Rewrite *model* (onnx.ModelProto, float32) in place by the rule above; returns *weights* as they are stored now.

    Requires: no subgraphs or local functions; initializers named as the parameters that they hold (name_weights).
    Ensures: the same inputs and outputs, of which *outputs* stay float32 and the inputs *halved* become half, as do
    outputs computed in half. *residual* is one of RESIDUALS. Raises ConfigError for an unknown *precision*, ModelError
    for a graph with subgraphs, ArtifactError where a weight is too large for the type.
    """
    check_precision(precision)
    if precision in ("fp32", "int8"):
        return dict(weights)
    if model.functions or any(entry.HasField("g") for node in model.graph.node for entry in node.attribute):
        raise ModelError(f"The graph holds subgraphs, which cannot be written in {precision}; use --precision fp32.")
    rewriter = _Rewriter(model, weights, PRECISIONS[precision], set(outputs), set(halved), residual=residual)
    rewriter.run()
    dtype = helper.tensor_dtype_to_np_dtype(PRECISIONS[precision])
    return {name: array.astype(dtype) if name in rewriter.matrices else array for name, array in weights.items()}


class _Rewriter:
    """The state of one rewrite: what type each value has so far, and which casts exist."""

    def __init__(
        self, model: Any, weights: Mapping[str, Array], half: int, outputs: set[str], halved: set[str], *, residual: str
    ) -> None:
        self.sums_in_half = residual == "half"
        self.graph, self.half, self.outputs, self.halved = model.graph, half, outputs, halved
        self.types = {value.name: value.type.tensor_type.elem_type for value in infer_values(model)}
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types |= {name: tensor.data_type for name, tensor in self.initializers.items()}
        self.floats = {name for name, kind in self.types.items() if kind == TensorProto.FLOAT}
        self.matrices = {
            name for name, tensor in self.initializers.items()
            if name in weights and name in self.floats and len(tensor.dims) >= 2
        }  # fmt: skip
        self.constants = set(self.initializers) | {
            name for node in self.graph.node if node.op_type in ("Constant", "ConstantOfShape") for name in node.output
        }
        self.learned = set(self.matrices) | self.halved  # and what is computed from them
        self.final = self._final_nodes()
        self.nodes: list[Any] = []
        self.casts: dict[tuple[str, int], str] = {}

    def _final_nodes(self) -> set[str]:
        """First outputs of the nodes that compute in float32 because the head's outputs come straight from them."""
        producers = {name: node for node in self.graph.node for name in node.output}
        found: set[str] = set()
        waiting = [producers[name] for name in self.outputs if name in producers]
        while waiting:
            node = waiting.pop()
            found.add(node.output[0])
            bias = node.op_type == "Add" and any(name in self.initializers for name in node.input)
            if bias or node.op_type in _MOVES:
                waiting += [producers[name] for name in node.input if name in producers and name in self.floats]
        return found

    def run(self) -> None:
        for value in self.graph.input:
            if value.name in self.halved and value.name in self.floats:
                self.types[value.name] = value.type.tensor_type.elem_type = self.half
        for name in self.matrices:
            self.types[name] = self.half
        for node in self.graph.node:
            in_half, read = self._computes_in_half(node), set(node.input)
            self._feed(node, self.half if in_half else TensorProto.FLOAT)
            self.nodes.append(node)
            made = [name for name in node.output if name in self.floats]
            if in_half:
                self.types |= dict.fromkeys(made, self.half)
            if self.learned & read:
                self.learned |= set(made)
        self._store()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self.graph.ClearField("value_info")
        for value in self.graph.output:
            value.type.tensor_type.elem_type = self.types[value.name]

    def _computes_in_half(self, node: Any) -> bool:
        if node.op_type == "Cast" or node.output[0] in self.final:
            return False
        if node.op_type in IN_FLOAT32 and not (self.sums_in_half and node.op_type == "LayerNormalization"):
            return False
        if node.op_type in _PRODUCTS:
            return bool(self.learned & set(node.input))
        if not any(self.types.get(name) == self.half for name in node.input):
            return False
        if node.op_type in _MOVES:
            return True
        given = [name for name in node.input if name in self.floats and name not in self.constants]
        sums = node.op_type == "Add" and len(given) == 2 and not self.sums_in_half
        return not sums and all(self.types[name] == self.half for name in given)

    def _feed(self, node: Any, wanted: int) -> None:
        """Give *node* its floating inputs in the type *wanted*."""
        for place, name in enumerate(node.input):
            if name in self.floats and self.types[name] != wanted and node.op_type not in ("Cast", "Shape"):
                node.input[place] = self._cast(name, wanted)

    def _cast(self, name: str, wanted: int) -> str:
        if (name, wanted) not in self.casts:
            cast = f"{name}_{TensorProto.DataType.Name(wanted).lower()}"
            self.casts[name, wanted] = cast
            self.nodes.append(helper.make_node("Cast", [name], [cast], name=f"cast_{cast}", to=wanted))
        return self.casts[name, wanted]

    def _store(self) -> None:
        """Matrices in half, and vectors and constants that no one reads in float32; a cast of the latter goes."""
        ours = set(self.casts.values())
        read = {name for node in self.nodes if node.output[0] not in ours for name in node.input}
        dropped = set()
        for name, tensor in self.initializers.items():
            cast = self.casts.get((name, self.half))
            if name in self.matrices:
                tensor.CopyFrom(self._halve(tensor, exact=True))
            elif cast is not None and name not in read:
                tensor.CopyFrom(self._halve(tensor, exact=False))
                tensor.name = cast
                dropped.add(cast)
        self.nodes = [node for node in self.nodes if node.output[0] not in dropped]

    def _halve(self, tensor: Any, *, exact: bool) -> Any:
        """*tensor* in half; a constant beyond its range (a mask's lowest number) becomes the nearest finite one."""
        dtype = helper.tensor_dtype_to_np_dtype(self.half)
        array = numpy_helper.to_array(tensor)
        largest = np.float32(_LARGEST[self.half])
        finite = np.isfinite(array)
        if exact and (np.abs(array[finite]) > largest).any():
            raise ArtifactError(
                f"{tensor.name} holds numbers beyond {largest:g}, the largest of fp16; use --precision bf16 or fp32."
            )
        return numpy_helper.from_array(
            np.where(finite, np.clip(array, -largest, largest), array).astype(dtype), tensor.name
        )
