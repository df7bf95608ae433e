"""Matrix products of given shapes on one runtime, dense and sparse: the protocol.

A file defines ``open_products(path, *, variant, threads) -> Products``. PyTorch's lies with the engines, because
nothing else in serve/ may import torch.
"""

import importlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self, cast

import numpy as np

from pst.errors import EngineError
from serve.bench.timing import Rule
from serve.engines._sparse_library import sparse_library

Call = Callable[[], float]
"""One pass, in milliseconds as the runtime's device took them."""
Weights = Sequence["np.ndarray"]
"""Matrices (outputs, inputs) of one shape, float32: as many layers, so that caches are as cold as in a model."""
SEED = 0
WARMUP = 2
"""Passes before the first round."""


class Product(Protocol):
    """As many products as there are weights, one after another."""

    kernel: str
    """What computes it, for people."""

    def at(self, tokens: int) -> Call:
        """For inputs (tokens, inputs)."""
        ...


class Products(Protocol):
    """Used in a ``with`` block."""

    name: str
    """The runtime and its device: onnxruntime-cpu, torch-cuda."""
    dtype: str
    """Of weights and inputs."""
    why_none: str
    """Why there is no sparse kernel, and what has one, for people."""

    def model(self, batch: int, sequence: int) -> Call:
        """The whole dense model."""
        ...

    def dense(self, weights: Weights) -> Product:
        """The runtime's dense kernel, whatever the weights hold."""
        ...

    def sparse(self, spec: str, weights: Weights) -> Product | None:
        """A kernel for the pattern *spec*, which the zeros of *weights* follow; None where there is none."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class _Module(Protocol):
    def open_products(self, path: Path, *, variant: str, threads: int) -> Products: ...


FILES = {"onnxruntime": "serve.predict.onnxruntime_products", "torch": "serve.engines._torch_products"}


def open_products(path: Path, *, engine: str, threads: int) -> Products:
    """*engine*: onnxruntime (CPU), onnxruntime-sparse (CPU, skipping zeros), torch-cuda, or auto.

    auto is the GPU where PyTorch sees one, else the CPU, with kernels that skip zeros where they can be compiled.
    Raises EngineError.
    """
    name, _, variant = engine.partition("-")
    if engine == "auto":
        try:
            return _module("torch").open_products(path, variant="cuda", threads=threads)
        except EngineError:
            name, variant = "onnxruntime", "sparse" if _skips_zeros() else "cpu"
    if name not in FILES:
        raise EngineError(
            f"pst predict measures no products with {engine}; choose onnxruntime, "
            "onnxruntime-sparse, torch-cuda or auto."
        )
    return _module(name).open_products(path, variant=variant, threads=threads)


def _skips_zeros() -> bool:
    """Whether there are kernels that do, or a compiler for them."""
    try:
        sparse_library()
    except EngineError:
        return False
    return True


def _module(name: str) -> _Module:
    return cast("_Module", importlib.import_module(FILES[name]))


def timed(call: Callable[[], object]) -> Call:
    """Wall-clock milliseconds of *call*."""

    def measured() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000

    return measured


def rounds(calls: Mapping[str, Call], rule: Rule) -> tuple[dict[str, list[float]], float]:
    """Rounds of one call each, every second one backwards, until *rule* says so: milliseconds by name, and seconds.

    Each timed call follows one that is not, as in serve.bench.timing.measure_in_turn.
    """
    for call in calls.values():
        for _ in range(WARMUP):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for index in itertools.count():
        for name, call in list(calls.items())[:: -1 if index % 2 else 1]:
            call()
            samples[name].append(call())
        seconds = time.perf_counter() - begin
        if rule.reached(samples, seconds=seconds):
            break
    return samples, seconds


def random_weights(outputs: int, inputs: int, copies: int) -> list[np.ndarray]:
    """Normally distributed, scaled so that outputs are of the size of inputs; the same each time."""
    random = np.random.default_rng(SEED)
    scale = np.float32(inputs**-0.5)
    return [random.standard_normal((outputs, inputs), dtype=np.float32) * scale for _ in range(copies)]
