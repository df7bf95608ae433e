"""Which initializers of an ONNX graph are weights of matrix products, and along which stored axis they are summed.

Works on any ONNX file. From each MatMul, Gemm (and their fused and quantised relatives) and 1x1 Conv the weight
operand is followed back through Cast, Identity, Transpose, QuantizeLinear and DequantizeLinear to the tensor that the
file stores; the reduction axis is carried along, so that it comes out right whatever transA, transB and Transpose say.
"""

from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper, numpy_helper

from export.tensors import refuse_pointer
from pst.errors import ArtifactError

Array = np.ndarray[Any, Any]
_SAME_LAYOUT = ("Identity", "Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, kw_only=True)
class GraphWeight:
    """A stored tensor that at least one matrix product multiplies with."""

    name: str
    """Of the initializer, or of the output of the Constant node that holds it."""
    axis: int
    """Reduction axis of the tensor as stored, 0 or more."""
    op: str
    """Operator type of the first node that uses it."""
    nodes: tuple[str, ...]
    """Names of the nodes that use it with this axis, in graph order."""
    tensor: Any
    """The TensorProto or SparseTensorProto."""
    zero_point: Array | None = None
    """What a stored zero reads as, broadcastable against the tensor; None stands for 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return tuple(self.tensor.dims)

    @property
    def itemsize(self) -> float:
        """Bytes one entry takes in the file, 0.5 for 4-bit types."""
        return itemsize(self.tensor)

    def values(self) -> Array:
        """The tensor as stored, in its shape; quantised ones with the zero point taken off, so that 0 means zero."""
        array = to_array(self.tensor, self.name)
        if self.zero_point is None or not self.zero_point.any():
            return array
        difference: Array = array.astype(np.int32) - self.zero_point
        return difference

    def matrix(self) -> tuple[Array, int]:
        """``values`` as a 2-D array, and its reduction axis: a 1x1 kernel (n, k, 1, 1) is (n, k) with axis 1."""
        return as_matrix(self.values(), self.axis)


def _data_type(tensor: Any) -> int:
    return int(tensor.values.data_type if isinstance(tensor, onnx.SparseTensorProto) else tensor.data_type)


def type_name(tensor: Any) -> str:
    """ONNX's name of a stored tensor's element type, in lower case: float, float16, int8."""
    return str(onnx.TensorProto.DataType.Name(_data_type(tensor))).lower()


def is_float(tensor: Any) -> bool:
    """Whether a stored tensor is of a floating type."""
    return "float" in type_name(tensor) or type_name(tensor) == "double"


def itemsize(tensor: Any) -> float:
    """Bytes per entry of a stored tensor, 0.5 for 4-bit types."""
    if type_name(tensor) in ("uint4", "int4", "float4e2m1"):
        return 0.5
    return float(onnx.helper.tensor_dtype_to_np_dtype(_data_type(tensor)).itemsize)


def to_array(tensor: Any, name: str) -> Array:
    """A TensorProto or SparseTensorProto as a dense array. ArtifactError where its data does not fit its shape."""
    try:
        if isinstance(tensor, onnx.SparseTensorProto):
            return _densify(tensor)
        array: Array = numpy_helper.to_array(tensor)
        return array
    except (ValueError, TypeError, IndexError) as error:
        raise ArtifactError(
            f"The data of tensor {name} does not fit its shape {list(tensor.dims)}; the ONNX file is damaged."
        ) from error


def _densify(sparse: Any) -> Array:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense: Array = np.zeros(tuple(sparse.dims), dtype=values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return dense


def load_onnx(path: Path) -> Any:
    """Read an ONNX file and its external data into a ModelProto.

    Raises ArtifactError: no such file, a Git LFS pointer, not ONNX, cut off, external data missing or too short.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is not there; give the path of an ONNX file.")
    refuse_pointer(path, ArtifactError)
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not an ONNX file, or it is damaged or cut off; export it again.") from error
    if not model.opset_import or not (model.graph.node or model.graph.initializer):
        raise ArtifactError(f"{path} holds no complete ONNX graph: it is empty or cut off; export it again.")
    _check_external_data(model, path)
    external_data_helper.load_external_data_for_model(model, str(path.parent))
    return model


def _check_external_data(model: Any, path: Path) -> None:
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        info = external_data_helper.ExternalDataInfo(tensor)
        location = Path(info.location)
        if location.is_absolute() or ".." in location.parts:
            raise ArtifactError(f"{path} keeps tensor {tensor.name} outside its own folder, at {location}; refused.")
        file = path.parent / location
        if not file.is_file():
            raise ArtifactError(
                f"{path} keeps its weights in {location}, which is missing; put that file beside it, or export again."
            )
        end = (info.offset or 0) + (info.length or 0)
        if file.stat().st_size < end:
            raise ArtifactError(
                f"{file} is cut off: tensor {tensor.name} ends at byte {end}, the file at {file.stat().st_size}; "
                "copy it again, or export again."
            )


def _tensors(graph: Any) -> Iterator[Any]:
    """Every TensorProto below *graph*, those of subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in _subgraphs(attribute):
                yield from _tensors(subgraph)


def _subgraphs(attribute: Any) -> list[Any]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def stored_tensors(graph: Any) -> dict[str, Any]:
    """Every named tensor that one graph stores: initializers, sparse initializers and Constant nodes."""
    found: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    found.update({sparse.values.name: sparse for sparse in graph.sparse_initializer})
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = attribute.t
                elif attribute.name == "sparse_value":
                    found[node.output[0]] = attribute.sparse_tensor
    return found


def find_weights(model: Any) -> list[GraphWeight]:
    """The weights of *model* (a ModelProto with its data loaded), in graph order; one entry per tensor and axis.

    Subgraphs (If, Loop) are searched, local functions are not: inline those first.
    """
    found: dict[tuple[str, int], GraphWeight] = {}
    _walk(model.graph, ChainMap(), ChainMap(), found)
    return list(found.values())


def _walk(
    graph: Any,
    outer_tensors: ChainMap[str, Any],
    outer_producers: ChainMap[str, Any],
    found: dict[tuple[str, int], GraphWeight],
) -> None:
    tensors, producers = outer_tensors.new_child(stored_tensors(graph)), outer_producers.new_child()
    for node in graph.node:
        for operand, axis, zero_point in _operands(node):
            weight = _resolve(operand, axis, zero_point, tensors, producers)
            if weight is not None:
                name, axis, tensor, zero = weight
                label = node.name or node.output[0]
                before = found.get((name, axis))
                nodes = (*before.nodes, label) if before else (label,)
                found[name, axis] = GraphWeight(
                    name=name, axis=axis, op=before.op if before else node.op_type, nodes=nodes, tensor=tensor,
                    zero_point=zero,
                )  # fmt: skip
        for attribute in node.attribute:
            for subgraph in _subgraphs(attribute):
                _walk(subgraph, tensors, producers, found)
        producers.update(dict.fromkeys(node.output, node))


def _operands(node: Any) -> list[tuple[str, int, str]]:
    """Of each operand of a matrix product: its name, its reduction axis, and the name of its zero point or ''."""
    name = (*node.input, "", "", "", "", "", "")
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
        return [
            (name[0], -2 if attributes.get("transA") else -1, ""),
            (name[1], -1 if attributes.get("transB") else -2, ""),
        ]
    if node.op_type == "MatMulInteger":
        return [(name[0], -1, name[2]), (name[1], -2, name[3])]
    if node.op_type == "DynamicQuantizeMatMul":
        return [(name[1], -2, name[3])]
    if node.op_type == "QLinearMatMul":
        return [(name[0], -1, name[2]), (name[3], -2, name[5])]
    if node.op_type == "Conv":
        return [(name[1], 1, "")]
    return []


def _resolve(
    name: str,
    axis: int,
    zero_point: str,
    tensors: MutableMapping[str, Any],
    producers: MutableMapping[str, Any],
) -> tuple[str, int, Any, Array | None] | None:
    """Follow *name* back to a stored tensor, carrying the reduction axis and the zero point's axis along."""
    is_kernel, zero_axis = axis == 1, -1
    while name not in tensors:
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type == "Transpose":
            perm = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
            # Without perm the axes are reversed: axis a from the front becomes axis a from the back.
            axis = perm[axis] if perm else -1 - axis
            zero_axis = perm[zero_axis] if perm else -1 - zero_axis
        elif node.op_type not in _SAME_LAYOUT:
            return None
        elif node.op_type == "DequantizeLinear" and len(node.input) > 2 and node.input[2]:
            zero_point = node.input[2]
            zero_axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        name = node.input[0]
    tensor = tensors[name]
    rank = len(tensor.dims)
    if rank < 2 or 0 in tensor.dims or (is_kernel and (rank < 3 or any(size != 1 for size in tensor.dims[2:]))):
        return None
    zero = None
    if zero_point in tensors:
        zero = _broadcast(to_array(tensors[zero_point], zero_point), zero_axis % rank, tuple(tensor.dims))
    return name, axis % rank, tensor, zero


def _broadcast(zero_point: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """A zero point (one, one per index of *axis*, or one per block along it) in a form that fits *shape*."""
    zero: Array = zero_point.astype(np.int32)
    if zero.ndim == 1 and zero.size > 1:
        return zero.reshape([-1 if position == axis else 1 for position in range(len(shape))])
    if zero.ndim == len(shape) and zero.shape != shape:
        repeated: Array = np.repeat(zero, -(-shape[axis] // zero.shape[axis]), axis=axis)
        return np.take(repeated, np.arange(shape[axis]), axis=axis)
    return zero


def as_matrix(values: Array, axis: int) -> tuple[Array, int]:
    """A weight of any rank as a 2-D one and its reduction axis: itself, or (everything else x reduction axis)."""
    if values.ndim == 2:
        return values, axis
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]), 1
