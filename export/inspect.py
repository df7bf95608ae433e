"""pst inspect: which weights of a file are sparse, how much, in which pattern, and what they weigh.

Reads run and model folders, artifacts, bare safetensors and ONNX files, whoever made them. Needs no torch; onnx only
for ONNX files.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.manifest import FILE_NAME, Manifest
from export.measure import Totals, WeightReport, add_up, measure
from export.tensors import StoredTensor, read_model_tensors, read_safetensors
from pst.errors import ArtifactError, EngineError, ModelError
from pst.files import read_json, resolve_model
from pst.models import architecture
from pst.progress import progress
from pst.structured.report import removal_of

if TYPE_CHECKING:
    from export.graph import GraphWeight

_Item = tuple[WeightReport | None, int, int, float]
"""Of one stored tensor: its row in the table, if it has one; entries; zeros; bytes."""
_NOTHING: _Item = (None, 0, 0, 0.0)
_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
_FUSED_CONV1D = re.compile(r"(^|\.)c_attn\.weight$")
_NOT_A_PRODUCT = re.compile(r"embed|norm|(^|\.)(wte|wpe|shared|relative_attention_bias|ln_\w+)\.", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in one file or folder."""

    path: str
    kind: str
    """run folder, model folder, artifact folder, safetensors file or ONNX file."""
    model_type: str | None
    """As config.json states it, where there is one."""
    weights: tuple[WeightReport, ...]
    """The 2-D weights of matrix products, in graph order or, of safetensors, by name."""
    totals: Totals
    structured: dict[str, Any] | None = None
    """What is left of each layer where heads and neurons were removed, as config.json has it."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value

    def render(self, *, terminal: bool | None = None) -> str:
        """As text: a table with colours on a terminal, plain and aligned elsewhere. None asks stdout which it is."""
        from export.render import render

        return render(self, terminal=sys.stdout.isatty() if terminal is None else terminal)


def inspect(path: Path) -> Inspection:
    """Measure every weight of a model.

    Raises ModelError or ArtifactError for what is not a model, damaged, cut off, or a Git LFS pointer; EngineError
    where onnx is needed and not installed.
    """
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a model folder, an artifact, a safetensors or an ONNX file.")
    if path.is_file():
        if path.suffix == ".onnx":
            return _inspect_onnx(path, "ONNX file", path)
        if path.suffix == ".safetensors":
            return _inspect_tensors(path, "safetensors file", read_safetensors(path), path.parent)
        raise ModelError(f"{path} is neither a .safetensors nor an .onnx file; give one of these, or a folder.")
    if (path / FILE_NAME).is_file():
        Manifest.load(path)
        return _inspect_onnx(path / "model.onnx", "artifact folder", path)
    folder = resolve_model(path)
    found = sorted(folder.glob("*.onnx"))
    if found and not (folder / "model.safetensors").exists() and not (folder / "model.safetensors.index.json").exists():
        if len(found) > 1:
            raise ArtifactError(f"{folder} holds {len(found)} ONNX files; give one of them, for example {found[0]}.")
        return _inspect_onnx(found[0], "artifact folder", path)
    if not (folder / "config.json").is_file() and not any(folder.glob("*.safetensors*")):
        raise ModelError(
            f"{path} is not a model: it holds no config.json, safetensors or ONNX file; give a run, model or artifact "
            "folder."
        )
    kind = "model folder" if folder == path else "run folder"
    return _inspect_tensors(path, kind, read_model_tensors(folder), folder)


def _model_type(folder: Path) -> str | None:
    if not (folder / "config.json").is_file():
        return None
    kind = read_json(folder / "config.json", ModelError, "copy or download the folder again.").get("model_type")
    return kind if isinstance(kind, str) else None


def _stated(path: Path) -> dict[str, str]:
    """The pattern of each weight of a folder that a plan was followed in, as its report says, by its stored name."""
    if path.is_file() and path.name not in ("model.onnx", "model.safetensors"):
        return {}
    folder = path.parent if path.is_file() else path
    file = folder / FILE_NAME if (folder / FILE_NAME).is_file() else resolve_model(folder) / "sparsity.json"
    if not file.is_file():
        return {}
    rows = read_json(file, ModelError, "write it again, or delete it.").get("weights")
    rows = rows if isinstance(rows, list) else []
    return {
        str(row.get("initializer", row.get("name"))): str(row["pattern"])
        for row in rows if isinstance(row, dict) and row.get("pattern")
    }  # fmt: skip


def _prunable(model_type: str | None, names: Iterable[str]) -> set[str]:
    """Which of the table's weights training would prune; all of them where the names say nothing."""
    rules = architecture(model_type or "generic").prunable
    chosen = {name for name in names if rules.search(name.removesuffix(".weight"))}
    return chosen or set(names)


# Safetensors ----------------------------------------------------------------------------------------------------------


def _inspect_tensors(path: Path, kind: str, tensors: dict[str, StoredTensor], folder: Path) -> Inspection:
    model_type = _model_type(folder)
    tensors = {name: tensors[name] for name in sorted(tensors, key=_natural)}
    rows = {name for name, tensor in tensors.items() if _is_product(tensor)}
    transposed = _has_conv1d(tensors, model_type)
    prunable, stated = _prunable(model_type, rows), _stated(path)

    def items() -> Iterator[_Item]:
        for name, tensor in tensors.items():
            if name in rows:
                axis = 0 if transposed and _CONV1D.search(name) else 1
                row = measure(
                    name, tensor.nonzero(), partial(_tensor_bytes, tensor), axis=axis,
                    dtype=tensor.dtype.lower(), itemsize=tensor.itemsize,
                    prunable=name in prunable, form="Linear" if axis == 1 else "Conv1D",
                    stated=stated.get(name),
                )  # fmt: skip
                yield row, row.size, row.zeros, row.size * tensor.itemsize
            elif tensor.is_float:
                zeros = tensor.size - int(tensor.nonzero().sum())
                yield None, tensor.size, zeros, tensor.size * tensor.itemsize
            else:
                yield _NOTHING

    return _collect(path, kind, model_type, items(), len(tensors), removal_of(folder))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _tensor_bytes(tensor: StoredTensor) -> bytes:
    return tensor.raw().tobytes()


def _is_product(tensor: StoredTensor) -> bool:
    return (
        tensor.is_float
        and len(tensor.shape) == 2
        and tensor.size > 0
        and tensor.name.endswith("weight")
        and _NOT_A_PRODUCT.search(tensor.name) is None
    )


def _has_conv1d(tensors: dict[str, StoredTensor], model_type: str | None) -> bool:
    """Whether c_attn and its like are GPT-2's Conv1D, stored inputs x outputs; without a config, by c_attn's shape."""
    if model_type is not None:
        return model_type in _CONV1D_TYPES
    fused = [tensor.shape for name, tensor in tensors.items() if _FUSED_CONV1D.search(name) and len(tensor.shape) == 2]
    return bool(fused) and all(columns == 3 * rows for rows, columns in fused)


# ONNX -----------------------------------------------------------------------------------------------------------------


def _inspect_onnx(file: Path, kind: str, path: Path) -> Inspection:
    try:
        from export import graph
    except ImportError as error:
        raise EngineError(
            f"Reading {file} needs the onnx package; install it with: pip install 'sparse-pst[train]'"
        ) from error
    model = graph.load_onnx(file)
    model_type = _model_type(file.parent)
    weights = {weight.name: weight for weight in graph.find_weights(model)}
    stored = graph.stored_tensors(model.graph)
    prunable, stated = _prunable(model_type, weights), _stated(path)

    def items() -> Iterator[_Item]:
        for name, weight in weights.items():
            values = weight.values()
            matrix, axis = graph.as_matrix(values != 0, weight.axis)
            row = measure(
                name, matrix, partial(_onnx_bytes, weight), axis=axis,
                dtype=graph.type_name(weight.tensor), itemsize=weight.itemsize, prunable=name in prunable,
                form=weight.op, stated=stated.get(name), shape=weight.shape, stored_axis=weight.axis,
            )  # fmt: skip
            yield row, row.size, row.zeros, row.size * weight.itemsize
        for name, tensor in stored.items():
            if name not in weights:
                if graph.is_float(tensor) and len(tensor.dims) > 0:
                    array = graph.to_array(tensor, name)
                    yield None, array.size, int((array == 0).sum()), array.size * graph.itemsize(tensor)
                else:
                    yield _NOTHING

    return _collect(path, kind, model_type, items(), len({**weights, **stored}), removal_of(file.parent))


def _onnx_bytes(weight: "GraphWeight") -> bytes:
    from export.graph import to_array

    return to_array(weight.tensor, weight.name).tobytes()


def _collect(
    path: Path,
    kind: str,
    model_type: str | None,
    items: Iterator[_Item],
    count: int,
    structured: dict[str, Any] | None,
) -> Inspection:
    rows, parameters, zeros, size = [], 0, 0, 0.0
    with progress(f"Inspecting {path.name}", total=count) as advance:
        for row, entries, empty, size_bytes in items:
            parameters, zeros, size = parameters + entries, zeros + empty, size + size_bytes
            if row is not None:
                rows.append(row)
            advance()
    if not parameters:
        raise ModelError(f"{path} holds no floating-point weights; give a model.")
    totals = add_up(rows, parameters=parameters, zeros=zeros, dense_bytes=round(size))
    return Inspection(
        path=str(path), kind=kind, model_type=model_type, weights=tuple(rows), totals=totals, structured=structured
    )
