"""int8 by static quantization: ONNX Runtime's quantizer, told which products to quantize, and its result checked.

The rule, called "block linears":

- The weights that training prunes (pst/models: every linear of the transformer blocks) become int8, one scale for each
  output, zero point 0. So a zero of the model is the integer 0, and reads as 0.0.
- What these products read is rounded to 8 bits, one scale for each tensor, from the range that calibration rows gave.
- All else stays float32: embeddings, norms, softmax, products of two activations, pooler and head, and every result.

Weights and activations are stored as QuantizeLinear and DequantizeLinear around float products (QDQ), which ONNX
Runtime and TensorRT fuse into integer ones. Two forms, because no single one is fast on both:

    activations   zero point   weights        for
    uint8         any          -64 to 64      ONNX Runtime on x86. Processors without VNNI add two products up in 16
                                              bits, which overflow with weights of 8 bits.
    int8          0            -127 to 127    TensorRT, which takes no other. ONNX Runtime on x86 leaves most of these
                                              products in float32.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from export.graph import find_weights
from export.large import copied
from export.manifest import WeightInfo
from export.passes.name_weights import rename
from pst.errors import ArtifactError, ConfigError, ModelError
from pst.patterns import parse_pattern

Array = np.ndarray[Any, Any]
ACTIVATIONS = ("uint8", "int8")
_PRODUCTS = ["MatMul", "Gemm"]
_SUFFIX = "_quantized"  # of the names that the quantizer gives
_HALF = 0.5 + 1e-3  # of a scale: how far rounding may move a weight


def check_activations(activations: str) -> None:
    """Raise ConfigError for a name that is not one of ACTIVATIONS."""
    if activations not in ACTIVATIONS:
        raise ConfigError(f"Unknown type of activations {activations!r}; use one of {', '.join(ACTIVATIONS)}.")


class _Rows(CalibrationDataReader):  # type: ignore[misc]
    """The calibration rows, in the form that the quantizer asks for."""

    def __init__(self, feeds: Iterable[Mapping[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, Array] | None:
        """The next row, or None after the last."""
        return next(self._feeds, None)


def quantize(model: Any, linears: Mapping[str, int], rows: Iterable[Mapping[str, Array]], *, activations: str) -> None:
    """Quantize *model* (onnx.ModelProto, float32) in place by the rule above.

    *linears*: names of the weights to quantize, as name_weights gives them. *rows*: the graph's inputs for each
    calibration row, unpadded. Requires initializers inside the model. Ensures the same inputs and outputs, standard
    operators alone, and int8 initializers under the names of the weights. Raises ModelError where the graph multiplies
    with none of *linears*.
    """
    check_activations(activations)
    nodes = [node for weight in find_weights(model) if weight.name in linears for node in weight.nodes]
    if not nodes:
        raise ModelError("The graph has no linear of a transformer block to quantize; use --precision fp32 or fp16.")
    for_cpu = activations == "uint8"
    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        copy = copied(model)
        add_pre_process_metadata(copy)  # its preparation, shape inference and fusions, would change names
        onnx.save(copy, before, save_as_external_data=True, location="float.data")
        quantize_static(
            before, after, _Rows(rows), quant_format=QuantFormat.QDQ, op_types_to_quantize=_PRODUCTS,
            nodes_to_quantize=nodes, per_channel=True, reduce_range=for_cpu, weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8 if for_cpu else QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
            extra_options={
                "ActivationSymmetric": not for_cpu,
                "OpTypesToExcludeOutputQuantization": _PRODUCTS,
                "QuantizeBias": for_cpu,  # of a Gemm; TensorRT wants float ones
            },
        )  # fmt: skip
        quantized = onnx.load(after)
    for tensor in quantized.graph.initializer:
        if not tensor.HasField("raw_data"):  # where external data and equal bytes are looked for
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    quantized.graph.ClearField("value_info")
    model.graph.CopyFrom(quantized.graph)
    rename(model.graph, {f"{name}{_SUFFIX}": name for name in linears})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice, which goes to the root logger, from the user's terminal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def verify_quantized(
    model: Any,
    weights: Mapping[str, Array],
    linears: Mapping[str, int],
    *,
    pattern: str,
    claims: Sequence[Mapping[str, Any]] = (),
) -> tuple[WeightInfo, ...]:
    """Check each quantized weight against the float one; return them as the graph stores them.

    *linears* maps names to reduction axes of *weights*. Each is int8 with zero point 0 and within half a scale of the
    float weight; each zero of the float weight is the integer 0; its pattern, which *claims* (as of verify_graph) may
    give it, else *pattern*, holds along the axis that the graph sums over, where a small weight that was rounded to 0
    still counts as kept. Raises ArtifactError for the first that
    fails.
    """
    specs = {str(claim["name"]): str(claim.get("pattern", pattern)) for claim in claims}
    found = {weight.name: weight for weight in find_weights(model)}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    infos = []
    for name, axis in linears.items():
        weight, reader = found.get(name), readers.get(name)
        if weight is None or reader is None or weight.tensor.data_type != onnx.TensorProto.INT8:
            raise ArtifactError(f"{name} was not quantized; nothing was written. Use --precision fp32 or fp16.")
        if weight.zero_point is not None and weight.zero_point.any():
            raise ArtifactError(f"{name} was quantized with a zero point other than 0; nothing was written.")
        stored = weight.values()
        trained = np.moveaxis(weights[name], axis, weight.axis)
        scale = numpy_helper.to_array(tensors[reader.input[1]])
        along = next((attribute.i for attribute in reader.attribute if attribute.name == "axis"), 1)
        scale = scale.reshape([-1 if place == along and scale.size > 1 else 1 for place in range(stored.ndim)])
        read = stored.astype(np.float32) * scale
        if (read[trained == 0] != 0).any():
            raise ArtifactError(f"{name} lost zeros when it was quantized; nothing was written.")
        if (np.abs(read - trained) > _HALF * scale).any():
            raise ArtifactError(f"{name} in the graph is not the trained weight rounded to int8; nothing was written.")
        spec = specs.get(name, pattern)
        if spec != "dense" and not parse_pattern(spec).holds((stored != 0) | (trained != 0), axis=weight.axis):
            raise ArtifactError(f"Pattern {spec} does not hold in {name} after quantization; nothing was written.")
        infos.append(
            WeightInfo(
                name=name, initializer=name, form=weight.op, shape=weight.shape, axis=weight.axis,
                density=int(np.count_nonzero(stored)) / stored.size, pattern=spec,
            )
        )  # fmt: skip
    return tuple(infos)
