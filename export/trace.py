"""From a PyTorch model to an ONNX graph: the only user of torch.onnx."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from export.cache import INPUTS, LENGTH, PAST, PAST_LENGTH, PRESENT, TOTAL_LENGTH, cache_names, run_cached
from export.lower_opset import lower_to_17
from export.passes.name_weights import PREFIX
from export.quiet import quiet_export
from export.source import Source
from pst.errors import ConfigError, ModelError

LOWEST_OPSET, HIGHEST_OPSET = 17, 23
_WRITTEN = 18  # the lowest opset that torch.onnx writes by itself
_BATCH, _LENGTH, _PAST = 2, 9, 3  # of the traced example; torch.export takes a size of 1 for a constant
_TOTAL = "total_sequence_length"  # of the traced example; a sum is no name of a dimension there


class _Wrapped(torch.nn.Module):
    """The model as a function from tensors to tensors, in the order of a signature. Its attribute's name is PREFIX."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.add_module(PREFIX.rstrip("."), source.model)
        self._inputs, self._outputs = source.input_names, source.head.outputs
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The head's outputs of integer inputs that are (batch_size, sequence_length) each."""
        (model,) = self.children()
        output = model(**dict(zip(self._inputs, inputs, strict=True)))
        return tuple(output[name] for name in self._outputs)


class _Cached(_Wrapped):
    """Likewise for a decoder, with its cache: see export/cache.py."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """logits and present of input_ids, attention_mask, position_ids and past."""
        (model,) = self.children()
        ids, mask, positions, *past = inputs
        return run_cached(model, ids, mask, positions, tuple(past))


@dataclass(frozen=True, kw_only=True)
class _Signature:
    """What torch.onnx is told: a function, an example, and the names of inputs, outputs and dimensions."""

    module: torch.nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[dict[int, Any], ...]


def check_opset(opset: int) -> None:
    """Raise ConfigError for an opset that cannot be written."""
    if not LOWEST_OPSET <= opset <= HIGHEST_OPSET:
        raise ConfigError(
            f"Opset {opset} cannot be written; choose {LOWEST_OPSET} (TensorRT 8.6 reads it) to {HIGHEST_OPSET}."
        )


def trace(source: Source, *, opset: int) -> Any:
    """The model as an onnx.ModelProto with dynamic batch_size and sequence_length, Optimum's names, float32.

    Raises ConfigError for the opset, ModelError for a model that torch.onnx cannot trace.
    """
    check_opset(opset)
    signature = _cached(source) if source.head.cached else _plain(source)
    with quiet_export(), torch.no_grad():
        try:
            program = torch.onnx.export(
                signature.module,
                signature.example,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                opset_version=max(opset, _WRITTEN),
                dynamo=True,
                verbose=False,
                dynamic_shapes=(signature.shapes,),
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            kind = type(source.model).__name__
            raise ModelError(f"torch.onnx cannot trace {kind}: {_reason(error)}") from error
    assert program is not None
    model = program.model_proto
    _name_sums(model)
    why = lower_to_17(model) if opset < _WRITTEN else None
    written = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if written != opset:
        reason = f" ({why})" if why else ""
        raise ModelError(
            f"This model needs opset {written}: it could not be lowered to {opset}{reason}; use --opset {written}."
        )
    return model


def _plain(source: Source) -> _Signature:
    length = min(_LENGTH, source.max_length)
    batch, sequence = torch.export.Dim("batch_size"), torch.export.Dim(LENGTH)
    count = len(source.input_names)
    return _Signature(
        module=_Wrapped(source),
        example=tuple(torch.ones(_BATCH, length, dtype=torch.long) for _ in range(count)),
        inputs=source.input_names,
        outputs=source.head.outputs,
        shapes=tuple({0: batch, 1: sequence} for _ in range(count)),
    )


def _cached(source: Source) -> _Signature:
    batch, sequence, total = (torch.export.Dim(name) for name in ("batch_size", LENGTH, _TOTAL))
    before = torch.export.Dim(PAST_LENGTH)
    positions = torch.arange(_PAST, _PAST + _LENGTH).repeat(_BATCH, 1)
    masks = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.long)
    cache = [tensor for layer in source.cache for tensor in layer.empty(_BATCH, _PAST)]
    return _Signature(
        module=_Cached(source),
        example=(torch.ones_like(positions), masks, positions, *cache),
        inputs=(*INPUTS, *cache_names(PAST, len(source.cache))),
        outputs=(*source.head.outputs, *cache_names(PRESENT, len(source.cache))),
        shapes=({0: batch, 1: sequence}, {0: batch, 1: total}, {0: batch, 1: sequence},
                *({0: batch, 2: before} for _ in cache)),
    )  # fmt: skip


def _name_sums(model: Any) -> None:
    """Call the length of past and new tokens together what Optimum calls it, everywhere alike."""
    sums = {_TOTAL, TOTAL_LENGTH, f"{LENGTH} + {PAST_LENGTH}"}  # the exporter sorts a sum's terms now so, now so
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sums:
                dim.dim_param = TOTAL_LENGTH


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
