"""From a PyTorch model to an ONNX graph: the only user of torch.onnx."""

from typing import Any

import torch

from export.passes.name_weights import PREFIX
from export.quiet import quiet_export
from export.source import Source
from pst.errors import ConfigError, ModelError

OUTPUT_NAME = "logits"
LOWEST_OPSET, HIGHEST_OPSET = 17, 23
_BATCH, _LENGTH = 2, 9  # of the traced example; torch.export takes a size of 1 for a constant


class _Logits(torch.nn.Module):
    """The model as a function from its inputs, in order, to its logits. Its attribute's name is PREFIX."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.add_module(PREFIX.rstrip("."), source.model)
        self._names = source.input_names
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits, (batch_size, labels), of integer inputs that are (batch_size, sequence_length) each."""
        (model,) = self.children()
        output: torch.Tensor = model(**dict(zip(self._names, inputs, strict=True))).logits
        return output


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
    length = min(_LENGTH, source.max_length)
    example = tuple(torch.ones(_BATCH, length, dtype=torch.long) for _ in source.input_names)
    batch, sequence = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    with quiet_export(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Logits(source),
                example,
                input_names=list(source.input_names),
                output_names=[OUTPUT_NAME],
                opset_version=opset,
                dynamo=True,
                verbose=False,
                dynamic_shapes=(tuple({0: batch, 1: sequence} for _ in example),),
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            kind = type(source.model).__name__
            raise ModelError(f"torch.onnx cannot trace {kind}: {_reason(error)}") from error
    assert program is not None
    model = program.model_proto
    written = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if written != opset:
        raise ModelError(
            f"This model needs opset {written}: the exporter could not lower it to {opset}; use --opset {written}."
        )
    return model


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
