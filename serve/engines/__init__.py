"""Runtimes behind one protocol: one file each in this folder, found by its name and imported on first use.

    with open_engine(Path("artifact"), engine="onnxruntime", threads=2) as engine:
        logits = engine.infer({"input_ids": ids, "attention_mask": mask})["logits"]   # (batch, labels)

An engine's module defines ``open_path(path, *, variant, threads, shapes) -> Engine``. What follows the first hyphen of
an engine's name is the variant: ``onnxruntime-cuda`` opens ``onnxruntime.py`` with the variant ``cuda``.
"""

import importlib
import os
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast, runtime_checkable

import numpy as np

from export.manifest import WeightInfo
from pst.errors import ArtifactError, EngineError

Array = np.ndarray
MAY_BE_EMPTY = "past_sequence_length"
PAST, PRESENT, LOGITS = "past_key_values.", "present.", "logits"
"""How a decoder's inputs and outputs of the cache begin, and its scores (export/cache.py)."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: its numpy type name, and a length or a symbol for each dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What an engine will be given, for those that prepare for it; none has to."""

    fixed: tuple[tuple[int, int], ...] = ()
    """Batch x tokens, again and again; of a decoder the prompt's."""
    others: bool = True
    """Whether other shapes will be given as well."""
    new_tokens: int = 0
    """Single tokens that a decoder reads after each of the fixed prompts."""
    spanned: bool = False
    """Whether to prepare once for all of the fixed ones, from the smallest to the largest: quicker than one by one."""
    faster_sparse: tuple[str, ...] | None = None
    """Weights that were found to be faster sparse at the fixed ones; None has torch's ``autotune`` measure."""


ANY_SHAPE = Shapes()


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One node of the graph that a runtime made, as it ran."""

    node: str
    operator: str
    """The runtime's own name of the kernel's operator: MatMul, FusedGemm, QLinearMatMul ..."""
    time_ms: float
    weights: tuple[str, ...]
    """Initializers of the model's file that it computes with; empty for attention's products, norms and the like."""
    kernel: str = ""
    """The runtime's name of what ran on a GPU, where it tells."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one weight's zeros."""

    eligible: bool | None
    """Whether the runtime has a sparse kernel for it; None where it does not say."""
    chosen: bool
    """Whether that kernel ran."""
    why: str
    """Why it did not, or which one did; no full stop."""
    advice: str = ""
    """What to change."""


class Engine(Protocol):
    """A loaded model, used in a ``with`` block. The arrays that infer returns are the caller's."""

    name: str
    """The runtime and its device as a person reads it, for example ``onnxruntime-cpu``."""
    threads: int
    """Threads that one inference uses on the CPU."""
    load_ms: float
    """Milliseconds that the runtime took to load the model, without importing the runtime itself."""
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    max_length: int | None
    """Longest sequence, in tokens, that the model has positions for; None where unknown."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. Raises EngineError where the feeds do not fit ``inputs``, or after close."""
        ...

    def close(self) -> None:
        """Free the model; safe to call twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Profiler(Protocol):
    """Inferences of one model of which the runtime tells the time of every layer."""

    def run(self, feeds: Mapping[str, Array]) -> None:
        """One inference."""
        ...

    def finish(self, *, weights: Iterable[str]) -> tuple[LayerTime, ...]:
        """The median time of each node, the first inferences left out. *weights*: initializers to look for."""
        ...

    def explain(self, weight: WeightInfo, *, pattern: str, place: LayerTime | None) -> Verdict:
        """After finish: what became of the zeros of *weight*, of *pattern*. *place*: where it ran, if known."""
        ...


@runtime_checkable
class ProfilingEngine(Engine, Protocol):
    """An engine whose runtime can tell the time of every layer."""

    def profiler(self) -> Profiler:
        """The same model, opened once more with the runtime's profiler on. Raises EngineError where that cannot be."""
        ...


@runtime_checkable
class PreparedEngine(Engine, Protocol):
    """An engine that prepares for single shapes."""

    @property
    def prepared_shapes(self) -> tuple[tuple[int, int], ...]:
        """Batch x tokens that it has kernels of their own for: a batch that is filled up to one of them runs those."""
        ...


class Cache(Protocol):
    """Keys and values of the rows that a decoder has read, where its runtime keeps them."""

    def extend(self, feeds: Mapping[str, Array]) -> Array:
        """Read the tokens of *feeds*, which are the engine's inputs but for the past, and keep theirs as well.

        The scores of what follows the last token, (rows, vocabulary). Raises EngineError, and is as before then.
        """
        ...

    def copy(self) -> Self:
        """The same rows once more, to go their own way; nothing is computed or moved."""
        ...

    def arrays(self) -> dict[str, Array]:
        """On the host, by the names of the engine's inputs: (rows, heads, tokens, width) each, the caller's."""
        ...


@runtime_checkable
class CachingEngine(Engine, Protocol):
    """An engine that keeps a decoder's cache on its device."""

    def cache(self, past: Mapping[str, Array]) -> Cache:
        """A cache of *past*, arrays by the names of the inputs that take it; of no tokens where a text begins."""
        ...


class _EngineModule(Protocol):
    def open_path(self, path: Path, *, variant: str, threads: int, shapes: Shapes) -> Engine: ...


def available_cpus() -> int:
    """Logical CPUs that this process may use: its affinity, further cut by a container's CPU quota (rounded up)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return count


def engine_names() -> list[str]:
    """The engines that this folder holds; whether their packages are installed shows when one is opened."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def open_engine(path: Path, *, engine: str = "auto", threads: int = 0, shapes: Shapes = ANY_SHAPE) -> Engine:
    """Load an artifact folder, a bare ``.onnx`` file, or a Hugging Face folder (or the run that holds one).

    *engine*: ``auto`` takes ONNX Runtime (on a GPU where it can) for what holds ONNX, and PyTorch otherwise.
    *threads*: CPU threads of one inference; 0 takes every CPU that the process may use.
    *shapes*: what it will be given; TensorRT tunes its plan for that, ONNX Runtime on CUDA records what it launches,
    and PyTorch compiles for it, and times layers at it, where its variant says so.

    Raises EngineError for an unknown or missing runtime, ArtifactError and ModelError for a damaged folder.
    """
    if threads < 0:
        raise EngineError(f"{threads} threads cannot be used; give a positive number, or 0 for every CPU.")
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give an artifact folder, an .onnx file or a model folder.")
    name, _, variant = engine.partition("-")
    if engine == "auto":
        is_onnx = path.is_file() or (path / "model.onnx").is_file()
        name, variant = ("onnxruntime" if is_onnx else "torch"), "auto"
    if name not in engine_names():
        raise EngineError(f"{engine} is not an engine; choose one of auto, {', '.join(engine_names())}.")
    module = cast("_EngineModule", importlib.import_module(f"{__name__}.{name}"))
    return module.open_path(path, variant=variant, threads=threads or available_cpus(), shapes=shapes)


def cache_inputs(inputs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The inputs that take a decoder's cache; none of a graph without one."""
    return {name: spec for name, spec in inputs.items() if name.startswith(PAST)}


def check_feeds(inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array], *, max_length: int | None) -> None:
    """Raise EngineError unless *feeds* has *inputs*' names, types and ranks, agreeing symbols, and no zero length.

    A dimension called MAY_BE_EMPTY, that of a decoder's cache, may be 0.
    """
    if set(feeds) != set(inputs):
        raise EngineError(
            f"The model takes the inputs {', '.join(inputs)}, but was given {', '.join(feeds) or 'none'}."
        )
    symbols: dict[str, tuple[int, str]] = {}
    for name, spec in inputs.items():
        value = feeds[name]
        if not isinstance(value, np.ndarray) or value.dtype != np.dtype(spec.dtype):
            given = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise EngineError(f"Input {name} must be an array of {spec.dtype}, but is {given}; convert it first.")
        if value.ndim != len(spec.shape):
            raise EngineError(f"Input {name} must have {len(spec.shape)} dimensions, but has the shape {value.shape}.")
        if any(not length and name != MAY_BE_EMPTY for length, name in zip(value.shape, spec.shape, strict=True)):
            raise EngineError(
                f"Input {name} is empty: its shape is {value.shape}; give at least one row and one token."
            )
        for length, expected in zip(value.shape, spec.shape, strict=True):
            if isinstance(expected, int):
                if length != expected:
                    raise EngineError(f"Input {name} has the shape {value.shape}, but the model wants {spec.shape}.")
            elif symbols.setdefault(expected, (length, name))[0] != length:
                first_length, first = symbols[expected]
                raise EngineError(
                    f"Inputs {first} and {name} must agree in {expected}, but have {first_length} and {length}."
                )
        if max_length is not None and value.ndim == 2 and value.shape[1] > max_length:
            raise EngineError(
                f"Input {name} has {value.shape[1]} tokens, but the model has positions for {max_length}; truncate it."
            )
