"""What there is to choose from: each artifact in each engine that opens it. Bad sets of artifacts are refused here."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.manifest import FILE_NAME, Manifest
from pst.errors import ConfigError, EngineError, ModelError
from pst.files import read_json, sha256
from pst.progress import note
from serve.bench.gpu import gpus
from serve.bench.runner import describe_subject, manifests_of, unique_names
from serve.describe import ModelFolder, describe
from serve.engines import Engine, Shapes, engine_names, open_engine
from serve.engines._onnxruntime_sparse import may_skip_zeros

AUTO = {
    ("onnx", True): ("onnxruntime-cuda", "tensorrt", "onnxruntime-cpu"),
    ("onnx", False): ("onnxruntime-cpu", "onnxruntime-sparse"),
    ("torch", True): (
        "torch-cuda",
        "torch-cuda-fp16-compiled",
        "torch-cuda-sparse-compiled",
        "torch-cuda-sparse-autotune-compiled",
    ),
    ("torch", False): ("torch-cpu",),
}
"""Engines that ``auto`` tries, by what the folder holds and whether there is an NVIDIA GPU."""
SIZES = {
    "model_type": ("model_type",),
    "vocab_size": ("vocab_size",),
    "width": ("hidden_size", "n_embd", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
}
"""What two folders of one model have in common, with the names that config.json gives it; structured ones too."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One artifact in one engine."""

    name: str
    artifact: str
    """The artifact's short name."""
    path: Path
    fingerprint: str
    """SHA-256 of export.json; of a model folder, of its weights."""
    engine: str
    """As --engine takes it."""
    is_dense: bool
    pattern: str
    sparsity: float | None
    precision: str
    linear_form: str
    """Of the weights that all artifacts prune: MatMul, Gemm or Conv, or several; empty where it is not told."""
    accuracy: float | None
    """That pst export --data measured; None where it did not."""

    @property
    def has_zeros(self) -> bool:
        """Whether it is sparse in place; of pattern structured nothing is zero, it is gone."""
        return not self.is_dense and self.pattern != "structured"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A candidate that could not be opened."""

    artifact: str
    engine: str
    why: str
    """One sentence, with the remedy."""


def candidates(paths: Sequence[Path], *, engine: str) -> list[Candidate]:
    """Each of *paths* in each engine of *engine* (names with commas, or auto) that reads its kind of file.

    The first dense one is the reference. Raises ConfigError where none is dense, where they are not of one model, or
    where an engine does not exist or reads none of them, and what describe raises.
    """
    names = unique_names(paths)
    folders = {name: _described(path) for name, path in names.items()}
    _check_one_model(folders)
    if not any(_is_dense(folder) for folder in folders.values()):
        raise ConfigError(
            f"None of {', '.join(names)} is dense, and --tune is to choose nothing slower than dense; give the "
            "artifact of the dense parent as well."
        )
    asked = _engines(engine)
    kinds = {name: "onnx" if (path / "model.onnx").is_file() else "torch" for name, path in names.items()}
    for each in asked:
        if _reads(each) not in kinds.values() and each != "auto":
            wanted = "model folders" if _reads(each) == "torch" else "artifacts that pst export wrote"
            raise ConfigError(f"The engine {each} reads {wanted}, and none was given; leave it out, or add one.")
    manifests = manifests_of({name: folder.path for name, folder in folders.items()})
    found = []
    has_gpu = bool(gpus())
    for name, folder in folders.items():
        kind = kinds[name]
        own = AUTO[kind, has_gpu] if asked == ["auto"] else [each for each in asked if _reads(each) == kind]
        made = manifests.get(name)
        mark = fingerprint(folder.path)
        for each in own:
            if len(own) > 1 and "sparse" in each.split("-") and not _has_use(each, folder):
                continue
            form = _form(made, manifests.values())
            found.append(_candidate(name, names[name], folder, made, engine=each, fingerprint=mark, form=form))
    return found


def _has_use(engine: str, folder: ModelFolder) -> bool:
    """Whether *engine*, which is for sparse models, may do more with *folder* than others; torch refuses dense ones."""
    return may_skip_zeros(folder.path) if engine == "onnxruntime-sparse" else not _is_dense(folder)


def fingerprint(path: Path) -> str:
    """SHA-256 of what changes whenever a model does: an artifact's export.json, or a model folder's weights."""
    exported = path / FILE_NAME
    return sha256(exported if exported.is_file() else describe(path).file)


def _form(made: Manifest | None, manifests: Collection[Manifest]) -> str:
    """Of the weights that all of *manifests* list: a dense one also lists those that others do not prune."""
    if made is None:
        return ""
    shared = set.intersection(*({weight.name for weight in each.weights} for each in manifests))
    return ", ".join(dict.fromkeys(each.form for each in made.weights if each.form and each.name in shared))


def open_candidates(
    found: Sequence[Candidate], stack: contextlib.ExitStack, *, threads: int, shapes: Shapes
) -> tuple[dict[str, Engine], list[LeftOut]]:
    """Engines by candidate's name, which *stack* closes, and the candidates whose runtime is missing or refuses.

    Raises EngineError where no dense one opens: there is nothing to be compared with then.
    """
    opened: dict[str, Engine] = {}
    left_out: list[LeftOut] = []
    for each in found:
        try:
            opened[each.name] = stack.enter_context(
                open_engine(each.path, engine=each.engine, threads=threads, shapes=shapes)
            )
        except EngineError as error:
            if all(str(error) != other.why for other in left_out):
                note(f"Goes on without {each.name}: {error}")
            left_out.append(LeftOut(artifact=each.artifact, engine=each.engine, why=str(error)))
    if not any(each.is_dense for each in found if each.name in opened):
        raise EngineError(f"No dense artifact opens, so that nothing can be compared. {left_out[0].why}")
    return opened, left_out


def _described(path: Path) -> ModelFolder:
    folder = describe_subject(path)
    if folder is None:
        raise ConfigError(
            f"{path} does not say whether it is dense; give --tune folders that pst export or pst train wrote."
        )
    return folder


def _is_dense(folder: ModelFolder) -> bool:
    """As it says; a model folder that nothing is said of is a plain one."""
    return folder.pattern == "dense" or (folder.pattern is None and folder.kind == "model")


def _check_one_model(folders: Mapping[str, ModelFolder]) -> None:
    first, *others = folders
    mine = _identity(folders[first])
    for name in others:
        theirs = _identity(folders[name])
        for field, value in mine.items():
            if theirs[field] != value:
                raise ConfigError(
                    f"{first} and {name} are not of one model: {field} is {value} and {theirs[field]}; --tune compares "
                    "a dense model with sparse versions of it."
                )


def _identity(folder: ModelFolder) -> dict[str, Any]:
    config = read_json(folder.path / "config.json", ModelError, "copy the whole folder again.")
    sizes = {
        field: next((config[key] for key in keys if config.get(key) is not None), None) for field, keys in SIZES.items()
    }
    return {"task": folder.task, "labels": ", ".join(folder.labels), **sizes}


def _engines(text: str) -> list[str]:
    asked = list(dict.fromkeys(each.strip() for each in text.split(",") if each.strip()))
    for each in asked:
        if each != "auto" and each.partition("-")[0] not in engine_names():
            raise ConfigError(f"{each} is not an engine; choose of {', '.join(engine_names())}, with commas, or auto.")
    if not asked or ("auto" in asked and len(asked) > 1):
        raise ConfigError("Give --engine names with commas, or auto by itself, which tries those of this machine.")
    return asked


def _reads(engine: str) -> str:
    return "torch" if engine.partition("-")[0] == "torch" else "onnx"


def _candidate(
    name: str, path: Path, folder: ModelFolder, made: Manifest | None, *, engine: str, fingerprint: str, form: str
) -> Candidate:
    return Candidate(
        name=f"{name} on {engine}",
        artifact=name,
        path=path,
        fingerprint=fingerprint,
        engine=engine,
        is_dense=_is_dense(folder),
        pattern=folder.pattern or ("dense" if _is_dense(folder) else "unknown"),
        sparsity=folder.sparsity,
        precision=made.precision if made else "fp32",
        linear_form=form,
        accuracy=made.accuracy.artifact if made and made.accuracy else None,
    )
