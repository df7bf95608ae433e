"""export.json: what an artifact is, what was proved of it, and what its files must hash to.

Needs the standard library and pst's leaves alone: a serving machine has neither torch nor onnx.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst.errors import ArtifactError
from pst.files import read_json, sha256, write_json

SCHEMA_VERSION = 1
FILE_NAME = "export.json"
MODEL_NAME = "model.onnx"
_REMEDY = "give a folder that pst export wrote, or export again."
_AGAIN = "copy the artifact again, or export again."


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One input or output of the graph."""

    name: str
    dtype: str
    """numpy's name: int64, float32."""
    shape: tuple[str | int, ...]
    """A name or a sum of names for each dynamic dimension (batch_size, sequence_length), a number for a fixed one."""


@dataclass(frozen=True, kw_only=True)
class WeightInfo:
    """One pruned weight (for a dense model: one weight of a matrix product)."""

    name: str
    """Of the PyTorch parameter."""
    initializer: str
    """In the ONNX graph."""
    shape: tuple[int, ...]
    """As the ONNX file stores it."""
    axis: int
    """Reduction axis, as the ONNX file stores it."""
    density: float
    """Fraction of non-zeros."""
    form: str = ""
    """The operator that reads it: MatMul, Gemm or Conv. Empty in artifacts of versions that did not say."""
    pattern: str = ""
    """That holds in it along the axis; dense where nothing is claimed. Likewise empty."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far ONNX Runtime's outputs are from PyTorch's."""

    max_abs_error: float
    max_rel_error: float
    """|difference| / |PyTorch|, over the outputs larger than the absolute tolerance."""
    label_agreement: float | None
    """Fraction of answers (rows; tokens where each has one) with the same highest score; None for outputs that are no
    scores: regression and feature_extraction."""
    tolerance: Mapping[str, float]
    """atol and rtol: every output is within atol * size + rtol * |PyTorch|; size is the outputs' root mean square, 1 at
    least. Of a half type and int8 also rms: the root mean square of the differences is within rms * size."""
    cases: tuple[Mapping[str, Any], ...]
    """Of each group of inputs: name, rows, batch_size, sequence_length, max_abs_error."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The task's metric of the model and of the artifact, on the same rows."""

    metric: str
    """accuracy, f1, matthews or pearson."""
    pytorch: float
    """Of the model, in float32."""
    artifact: float
    """Of the graph, in ONNX Runtime on the CPU; of bf16 with the rounding that a GPU does."""
    rows: int
    fingerprint: str
    """SHA-256 of the rows' content."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of export.json."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    precision: str
    """Of the graph's weights and arithmetic: fp32, or fp16, bf16 or int8 with fp32 norms, softmax and logits."""
    task: str
    """classification, regression, or another head: token_classification, question_answering, feature_extraction,
    text_generation."""
    labels: tuple[str, ...]
    """Names by label id, of classification and token_classification; empty for others."""
    max_length: int
    """Tokens a row is cut to; of text_generation, the most that prompt and answer have together."""
    pad_token_id: int
    pattern: str
    """Of all weights; dense where nothing is claimed, mixed where each has its own."""
    sparsity: Mapping[str, float]
    """requested and measured fraction of zeros over *weights*; of pattern structured, of what was removed."""
    weights: tuple[WeightInfo, ...]
    parity: Parity
    files: Mapping[str, str]
    """SHA-256 of each file of the artifact but export.json."""
    source: Mapping[str, Any]
    """What it was made from: SHA-256 of the model's files, base_model."""
    versions: Mapping[str, str]
    """Of the packages that made it."""
    structured: Mapping[str, Any] | None = None
    """Where heads and neurons were removed, what is left of each layer, as config.json has it; None elsewhere."""
    quantization: Mapping[str, Any] | None = None
    """Of int8: activations (uint8 or int8), calibration_rows; None for other precisions."""
    residual: str = "fp32"
    """Type of the residual stream: fp32, or half, that of the precision."""
    accuracy: Accuracy | None = None
    """None where no labelled data was given."""
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, schema_version first."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"schema_version": value.pop("schema_version"), **value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str) -> "Manifest":
        """The reverse of to_json. Unknown keys are ignored. ArtifactError, naming *where*, for what does not fit."""
        version = value.get("schema_version")
        if not isinstance(version, int):
            raise ArtifactError(f"{where} states no schema_version; {_REMEDY}")
        if version > SCHEMA_VERSION:
            raise ArtifactError(
                f"{where} has schema version {version}, this program reads up to {SCHEMA_VERSION}; update it."
            )
        try:
            return cls(
                schema_version=version,
                inputs=tuple(_tensor(row) for row in value["inputs"]),
                outputs=tuple(_tensor(row) for row in value["outputs"]),
                opset=int(value["opset"]),
                precision=str(value["precision"]),
                task=str(value["task"]),
                labels=tuple(str(name) for name in value["labels"]),
                max_length=int(value["max_length"]),
                pad_token_id=int(value["pad_token_id"]),
                pattern=str(value["pattern"]),
                sparsity=dict(value["sparsity"]),
                weights=tuple(_weight(row) for row in value["weights"]),
                parity=_parity(value["parity"]),
                files=dict(value["files"]),
                source=dict(value["source"]),
                versions=dict(value["versions"]),
                structured=None if value.get("structured") is None else dict(value["structured"]),
                quantization=None if value.get("quantization") is None else dict(value["quantization"]),
                residual=str(value.get("residual", "fp32")),
                accuracy=_accuracy(value.get("accuracy")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{where} is not a whole export.json ({error!r}); {_AGAIN}") from error

    def save(self, folder: Path) -> None:
        """Write export.json into *folder*."""
        write_json(folder / FILE_NAME, self.to_json())

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> "Manifest":
        """Read *folder*/export.json and check that its files are there and, with *verify*, hash to what it says.

        Raises ArtifactError: no artifact, a newer schema, a file missing, damaged or replaced.
        """
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is not a folder; {_REMEDY}")
        manifest = cls.from_json(read_json(folder / FILE_NAME, ArtifactError, _REMEDY), where=str(folder / FILE_NAME))
        for name in (MODEL_NAME, *manifest.files):
            if "/" in name or "\\" in name or name in ("", "..", FILE_NAME):
                raise ArtifactError(f"{folder / FILE_NAME} lists {name!r}, not a file of an artifact; refused.")
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder} lacks {name}; {_AGAIN}")
        if verify:
            for name, expected in manifest.files.items():
                if sha256(folder / name) != expected:
                    raise ArtifactError(
                        f"{folder / name} is damaged or was changed: its SHA-256 is not that in {FILE_NAME}; {_AGAIN}"
                    )
        return manifest


def load(folder: Path, *, verify: bool = True) -> Manifest:
    """See Manifest.load."""
    return Manifest.load(folder, verify=verify)


def _tensor(row: Mapping[str, Any]) -> TensorInfo:
    return TensorInfo(name=str(row["name"]), dtype=str(row["dtype"]), shape=tuple(row["shape"]))


def _weight(row: Mapping[str, Any]) -> WeightInfo:
    return WeightInfo(
        name=str(row["name"]), initializer=str(row["initializer"]), shape=tuple(int(size) for size in row["shape"]),
        axis=int(row["axis"]), density=float(row["density"]), form=str(row.get("form", "")),
        pattern=str(row.get("pattern", "")),
    )  # fmt: skip


def _parity(value: Mapping[str, Any]) -> Parity:
    agreement = value["label_agreement"]
    return Parity(
        max_abs_error=float(value["max_abs_error"]),
        max_rel_error=float(value["max_rel_error"]),
        label_agreement=None if agreement is None else float(agreement),
        tolerance=dict(value["tolerance"]),
        cases=tuple(dict(case) for case in value["cases"]),
    )


def _accuracy(value: Mapping[str, Any] | None) -> Accuracy | None:
    if value is None:
        return None
    return Accuracy(
        metric=str(value["metric"]), pytorch=float(value["pytorch"]), artifact=float(value["artifact"]),
        rows=int(value["rows"]), fingerprint=str(value["fingerprint"]),
    )  # fmt: skip
