"""pst export: from a run or model folder to an artifact folder, written only once everything about it was proved."""

import importlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from export.accuracy import has_metric, measure_accuracy
from export.cache import PAST, cache_names
from export.cases import CALIBRATION_ROWS, calibration_rows
from export.graph import find_weights
from export.heads import check_task
from export.large import copied
from export.manifest import MODEL_NAME, Manifest, TensorInfo
from export.parity import check_parity, open_session
from export.passes import LINEAR_FORMS, OPERATORS, check_linear_form, run_passes
from export.precision import MEAN_SHARE, PRECISIONS, TOLERANCES, check_precision, check_residual, to_precision
from export.quantize import check_activations, quantize, verify_quantized
from export.source import SPARSITY_FILE, Source, load_source
from export.sparse_storage import check_storage, store_sparse
from export.tensors import weight_files
from export.trace import check_opset, trace
from export.verify import measured_sparsity, verify_claims, verify_graph, weights_as_found
from export.widen import widen
from pst import __version__
from pst.errors import ConfigError
from pst.files import atomic_folder, refuse_existing, sha256
from pst.plan import MIXED
from pst.progress import note, progress
from pst.sparsify import prunable_weights
from pst.structured.report import FIELD, removed_share

_PROTOBUF_LIMIT = 2_000_000_000  # bytes; a protobuf file ends at 2 GiB, some of which is the graph
_LOAD, _TRACE, _WRITE, _COMPARE = 15, 50, 5, 30  # per cent of the time that each stage usually takes
_STEPS = _LOAD + _TRACE + _WRITE + _COMPARE
_CONV_IN_BF16 = 22  # opset
_COPIED = ("config.json", "generation_config.json")
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers", "numpy")


def export(
    source: Path,
    output: Path,
    *,
    task: str = "auto",
    opset: int = 17,
    precision: str = "fp32",
    residual: str = "fp32",
    linear_form: str = "auto",
    activations: str = "uint8",
    storage: str = "dense",
    examples: Any = None,
    calibration: Any = None,
    data: str | None = None,
    overwrite: bool = False,
    external_data: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
) -> Manifest:
    """Write the ONNX artifact of a run or model folder to *output*, and return its manifest.

    *task* is the name of a head (export/heads), or "auto" for the one that the model's class has. *precision* is fp32,
    fp16 or bf16, by the rule in export/precision.py, or int8, by that in export/quantize.py: with *activations* uint8
    or int8, and ranges from the rows of *calibration* (texts like *examples*), which it cannot do without.
    *residual*, fp32 or half, is the type of the residual stream of a half precision.
    *linear_form* is one of export.passes.LINEAR_FORMS: the operator that the prunable layers are written as. *storage*
    is dense or sparse, see export/sparse_storage.py.
    *examples* (a pst.data.Examples) are the real inputs on which ONNX Runtime is compared with PyTorch; without them a
    few built-in sentences are used. *data* is what the user called them: then, where they have labels, the metric of
    the model and of the artifact on all of them is part of the manifest. *external_data* keeps the weights in a file
    beside model.onnx, as is always done above 2 GB. *atol* and *rtol* bound the difference of every output, as
    export.parity says; None stands for the precision's own.
    Nothing is written unless the pattern holds and the outputs agree.
    Raises ConfigError, ModelError, ArtifactError, RunError and StorageError.
    """
    check_options(
        output, task=task, opset=opset, precision=precision, residual=residual, linear_form=linear_form,
        activations=activations, storage=storage, overwrite=overwrite, atol=atol, rtol=rtol,
        calibrated=calibration is not None,
    )  # fmt: skip
    refuse_existing(output, overwrite=overwrite, reads=[source])
    with progress("Exporting", total=_STEPS) as advance:
        return _export(
            source, output, advance, task=task, opset=opset, precision=precision, residual=residual,
            linear_form=linear_form, activations=activations, storage=storage, examples=examples,
            calibration=calibration, data=data, overwrite=overwrite, external_data=external_data, atol=atol, rtol=rtol,
        )  # fmt: skip


def check_options(
    output: Path,
    *,
    task: str,
    opset: int,
    precision: str,
    overwrite: bool,
    atol: float | None,
    rtol: float | None,
    residual: str = "fp32",
    linear_form: str = "auto",
    activations: str = "uint8",
    storage: str = "dense",
    calibrated: bool = True,
) -> None:
    """Raise what export raises for options that no model could be exported with, before any work is done.

    *calibrated*: whether there is text for int8 to be calibrated on.
    """
    check_task(task)
    check_opset(opset)
    check_precision(precision)
    check_residual(residual, precision=precision)
    check_linear_form(linear_form)
    if linear_form == "conv" and precision == "bf16" and opset < _CONV_IN_BF16:
        raise ConfigError(
            f"Conv takes bf16 from opset {_CONV_IN_BF16} on; use --opset {_CONV_IN_BF16}, --precision fp16, or another "
            "--linear-form."
        )
    check_activations(activations)
    if activations == "int8" and precision != "int8":
        raise ConfigError(f"--activations int8 is for products in int8; add --precision int8, which is {precision}.")
    check_storage(storage)
    if precision == "int8" and linear_form == "conv":
        raise ConfigError("int8 is for MatMul and Gemm; use another --linear-form, or --precision fp16.")
    if precision == "int8" and not calibrated:
        raise ConfigError("int8 needs real text, which the ranges of its activations are taken from; give --data.")
    for name, tolerance in (("atol", atol), ("rtol", rtol)):
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise ConfigError(f"--{name} is {tolerance:g}; it must be a finite number of at least 0.")
    refuse_existing(output, overwrite=overwrite)


def _export(
    source: Path,
    output: Path,
    advance: Callable[..., None],
    *,
    task: str,
    opset: int,
    precision: str,
    residual: str,
    linear_form: str,
    activations: str,
    storage: str,
    examples: Any,
    calibration: Any,
    data: str | None,
    overwrite: bool,
    external_data: bool,
    atol: float | None,
    rtol: float | None,
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

        def prove(what: str) -> None:
            """Before another rewrite, which would hide whose fault a difference is."""
            exact = _tolerance("fp32", atol, rtol)
            verify_graph(model, weights, claims, pattern=pattern)
            proven = check_parity(loaded, _session(model), examples=examples, atol=exact[0], rtol=exact[1])
            note(f"{what}, outputs agree with PyTorch within {proven.max_abs_error:.1e}.")

        if linear_form != "auto":
            prove("As torch.onnx wrote it")
            _to_form(model, loaded, weights, linear_form)
        if precision != "fp32":
            prove("In fp32")
        weights = to_precision(
            model, weights, precision=precision, outputs=loaded.head.outputs,
            halved=cache_names(PAST, len(loaded.cache)), residual=residual,
        )  # fmt: skip
        removal: dict[str, Any] | None = getattr(loaded.model.config, FIELD, None) if pattern == "structured" else None
        if precision == "int8":
            linears = {item.name: item.axis for item in prunable_weights(loaded.model)}
            note(f"Quantizing {len(linears)} weights, calibrated on {min(len(calibration), CALIBRATION_ROWS)} rows ...")
            quantize(model, linears, calibration_rows(loaded, calibration), activations=activations)
            infos = verify_quantized(model, weights, linears, pattern=pattern, claims=claims)
        else:
            infos = verify_graph(model, weights, claims, pattern=pattern) or weights_as_found(model, weights)
        measured = removed_share(removal) if removal else measured_sparsity(infos)
        requested = float(report.get("sparsity", {}).get("requested", 0.0))
        note(_found(len(infos), measured, pattern=pattern, removal=removal))
        wide = None if precision in ("fp32", "int8") else _session(widen(model, PRECISIONS[precision]))
        if storage == "sparse":
            names, saved = store_sparse(model)
            note(f"{len(names)} tensors are stored without their zeros, which saves {saved / 1e6:,.2f} MB.")
        save_onnx(model, folder / MODEL_NAME, external_data=external_data)
        advance(_WRITE)
        allowed = _tolerance(precision, atol, rtol)
        compared = _Counter(advance, _COMPARE)
        parity = check_parity(
            loaded, wide or open_session(folder / MODEL_NAME), examples=examples, atol=allowed[0], rtol=allowed[1],
            rms=None if precision == "fp32" else MEAN_SHARE * allowed[0], rms_of_random=precision != "int8",
            advance=compared,
        )  # fmt: skip
        if precision == "fp16":  # the file itself; of bf16 no operator runs there
            as_stored = open_session(folder / MODEL_NAME)
            check_parity(loaded, as_stored, examples=examples, atol=allowed[0], rtol=allowed[1])
        note(f"Outputs agree with PyTorch within {parity.max_abs_error:.1e}.")
        accuracy = None
        if data is not None and has_metric(loaded, examples):
            session = wide if precision == "bf16" else open_session(folder / MODEL_NAME)
            accuracy = measure_accuracy(loaded, session, examples, data=data)
        quantization = None
        if precision == "int8":
            rows = min(len(calibration), CALIBRATION_ROWS)
            quantization = {"activations": activations, "calibration_rows": rows}
        for name in _COPIED:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, folder / name)
        _save_tokenizer(loaded.tokenizer, folder)
        manifest = Manifest(
            inputs=tuple(_tensor(value) for value in model.graph.input),
            outputs=tuple(_tensor(value) for value in model.graph.output),
            opset=opset, precision=precision, residual=residual, task=loaded.task, labels=loaded.labels,
            max_length=loaded.max_length, pad_token_id=loaded.pad_token_id, pattern=pattern,
            sparsity={"requested": requested, "measured": measured}, weights=infos, parity=parity,
            files={path.name: sha256(path) for path in sorted(folder.iterdir())},
            source=_provenance(loaded), versions=_versions(), structured=removal, quantization=quantization,
            accuracy=accuracy,
        )  # fmt: skip
        manifest.save(folder)
    return manifest


def _found(count: int, share: float, *, pattern: str, removal: dict[str, Any] | None) -> str:
    """What was checked of *count* weights, with the *share* of zeros, or of what was removed."""
    if removal:
        return f"Each of {count} weights is as trained; {share:.1%} of the {removal['target']} are gone."
    held = "its own pattern" if pattern == MIXED else pattern
    claim = "was taken as found" if pattern == "dense" else f"holds {held} along its reduction axis"
    return f"Each of {count} weights {claim}; {share:.1%} of them are zeros."


def _to_form(model: Any, loaded: Source, weights: Any, linear_form: str) -> None:
    """Bring the prunable layers into the form, and say which of them keep another."""
    prunable = {item.name: weights[item.name] for item in prunable_weights(loaded.model)}
    run_passes(model, prunable, passes=LINEAR_FORMS[linear_form])
    others = [found.name for found in find_weights(model)
              if found.name in prunable and found.op != OPERATORS[linear_form]]  # fmt: skip
    if others:
        note(f"{len(others)} weights keep the form that torch.onnx gave them, {others[0]} among them.")


def _tolerance(precision: str, atol: float | None, rtol: float | None) -> tuple[float, float]:
    """atol and rtol as given, or else those of the precision."""
    usual = TOLERANCES[precision]
    return usual[0] if atol is None else atol, usual[1] if rtol is None else rtol


def _session(model: Any) -> Any:
    """A session of a model that is not kept. Leaves *model* as it is."""
    copy = copied(model)
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(copy, Path(folder) / MODEL_NAME)
        return open_session(Path(folder) / MODEL_NAME)


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
    values = (part for sparse in model.graph.sparse_initializer for part in (sparse.values, sparse.indices))
    size = sum(len(tensor.raw_data) for tensor in (*model.graph.initializer, *values))
    if external_data or size > _PROTOBUF_LIMIT:
        data = path.with_name(f"{path.name}.data")
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
        if data.is_file():  # of small tensors alone there is none
            data.chmod(path.stat().st_mode)  # onnx leaves it to its owner alone
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
    """What wrote the files, by the modules' own word: the module onnxruntime comes in packages of several names."""
    return {"pst": __version__, **{name: str(importlib.import_module(name).__version__) for name in _PACKAGES}}
