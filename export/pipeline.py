"""pst export: from a run or model folder to an artifact folder, written only once everything about it was proved."""

import importlib.metadata
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from export.heads import check_task
from export.manifest import MODEL_NAME, Manifest, TensorInfo
from export.parity import ATOL, RTOL, check_parity, open_session
from export.passes import run_passes
from export.source import SPARSITY_FILE, Source, load_source
from export.tensors import weight_files
from export.trace import check_opset, trace
from export.verify import measured_sparsity, verify_claims, verify_graph, weights_as_found
from pst import __version__
from pst.errors import ConfigError
from pst.files import atomic_folder, refuse_existing, sha256
from pst.progress import note, progress

_PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf file ends at 2 GiB, some of which is the graph
_LOAD, _TRACE, _WRITE, _COMPARE = 15, 50, 5, 30  # per cent of the time that each stage usually takes
_STEPS = _LOAD + _TRACE + _WRITE + _COMPARE
_COPIED = ("config.json", "generation_config.json")
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers", "numpy")


def export(
    source: Path,
    output: Path,
    *,
    task: str = "auto",
    opset: int = 17,
    examples: Any = None,
    overwrite: bool = False,
    external_data: bool = False,
    atol: float = ATOL,
    rtol: float = RTOL,
) -> Manifest:
    """Write the ONNX artifact of a run or model folder to *output*, and return its manifest.

    *task* is the name of a head (export/heads), or "auto" for the one that the model's class has.
    *examples* (a pst.data.Examples) are the real inputs on which ONNX Runtime is compared with PyTorch; without them a
    few built-in sentences are used. *external_data* keeps the weights in a file beside model.onnx, as is always done
    above 2 GB. *atol* and *rtol* bound the difference of every output, as export.parity says.
    Nothing is written unless the pattern holds and the outputs agree.
    Raises ConfigError, ModelError, ArtifactError, RunError and StorageError.
    """
    check_options(output, task=task, opset=opset, overwrite=overwrite, atol=atol, rtol=rtol)
    with progress("Exporting", total=_STEPS) as advance:
        return _export(
            source, output, advance, task=task, opset=opset, examples=examples, overwrite=overwrite,
            external_data=external_data, atol=atol, rtol=rtol,
        )  # fmt: skip


def check_options(output: Path, *, task: str, opset: int, overwrite: bool, atol: float, rtol: float) -> None:
    """Raise what export raises for options that no model could be exported with, before any work is done."""
    check_task(task)
    check_opset(opset)
    if not (0 <= atol < math.inf and 0 <= rtol < math.inf):
        raise ConfigError(f"--atol is {atol:g} and --rtol {rtol:g}; each must be a finite number of at least 0.")
    refuse_existing(output, overwrite=overwrite)


def _export(
    source: Path,
    output: Path,
    advance: Callable[..., None],
    *,
    task: str,
    opset: int,
    examples: Any,
    overwrite: bool,
    external_data: bool,
    atol: float,
    rtol: float,
) -> Manifest:
    loaded = load_source(source, task=task)
    advance(_LOAD)
    report = loaded.sparsity or {}
    pattern, claims = str(report.get("pattern", "dense")), report.get("weights", [])
    weights = loaded.weights()
    verify_claims(weights, claims, pattern=pattern)
    with atomic_folder(output, overwrite=overwrite) as folder:
        note(f"Tracing {type(loaded.model).__name__} with opset {opset} ...")
        model = trace(loaded, opset=opset)
        advance(_TRACE)
        run_passes(model, weights)
        infos = verify_graph(model, weights, claims, pattern=pattern) or weights_as_found(model, weights)
        measured = measured_sparsity(infos)
        requested = float(report.get("sparsity", {}).get("requested", 0.0))
        claim = "was taken as found" if pattern == "dense" else f"holds {pattern} along its reduction axis"
        note(f"Each of {len(infos)} weights {claim}; {measured:.1%} of them are zeros.")
        save_onnx(model, folder / MODEL_NAME, external_data=external_data)
        advance(_WRITE)
        compared = _Counter(advance, _COMPARE)
        parity = check_parity(
            loaded, open_session(folder / MODEL_NAME), examples=examples, atol=atol, rtol=rtol, advance=compared
        )
        note(f"Outputs agree with PyTorch within {parity.max_abs_error:.1e}.")
        for name in _COPIED:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, folder / name)
        _save_tokenizer(loaded.tokenizer, folder)
        manifest = Manifest(
            inputs=tuple(_tensor(value) for value in model.graph.input),
            outputs=tuple(_tensor(value) for value in model.graph.output),
            opset=opset, precision="fp32", task=loaded.task, labels=loaded.labels, max_length=loaded.max_length,
            pad_token_id=loaded.pad_token_id, pattern=pattern,
            sparsity={"requested": requested, "measured": measured}, weights=infos, parity=parity,
            files={path.name: sha256(path) for path in sorted(folder.iterdir())},
            source=_provenance(loaded), versions=_versions(),
        )  # fmt: skip
        manifest.save(folder)
    return manifest


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the Rust library raises bare Exception, with the number in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


class _Counter:
    """Turns a fraction done into steps of a progress bar, of which it stands for *steps*."""

    def __init__(self, advance: Callable[..., None], steps: int) -> None:
        self._advance, self._steps, self._done = advance, steps, 0

    def __call__(self, fraction: float) -> None:
        done = int(fraction * self._steps)
        self._advance(done - self._done)
        self._done = done


def save_onnx(model: Any, path: Path, *, external_data: bool = False) -> None:
    """Write a ModelProto, its weights in NAME.data beside it when asked or when they would not fit. Changes *model*."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if external_data or size > _PROTOBUF_LIMIT:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))


def _tensor(value: Any) -> TensorInfo:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    shape = tuple(dim.dim_param or int(dim.dim_value) for dim in kind.shape.dim)
    return TensorInfo(name=value.name, dtype=dtype, shape=shape)


def _provenance(source: Source) -> dict[str, Any]:
    """What the artifact was made from, without paths of the machine that made it."""
    files = [*weight_files(source.folder), source.folder / SPARSITY_FILE]
    base = str((source.sparsity or {}).get("base_model") or "")
    if os.path.isabs(base) or base.startswith(".") or Path(base).exists():
        base = Path(base).name
    return {"sha256": {path.name: sha256(path) for path in files if path.is_file()}, "base_model": base or None}


def _versions() -> dict[str, str]:
    return {"pst": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}
