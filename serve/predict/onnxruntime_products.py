"""Matrix products on ONNX Runtime's CPU provider, and those that skip zeros: see serve.predict.products.

The whole model is an artifact's own model.onnx; of a Hugging Face folder, ``pst export`` makes one for the time.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from export import manifest
from export.manifest import FILE_NAME
from pst.errors import EngineError
from pst.files import resolve_model
from pst.progress import note
from serve.bench.workload import random_workload
from serve.closing import Closing
from serve.describe import vocab_size
from serve.engines import available_cpus, cache_inputs, open_engine
from serve.engines._onnxruntime_providers import session_options
from serve.engines._onnxruntime_sparse import register, sparse_graph
from serve.engines._sparse_layout import densest
from serve.engines._sparse_library import sparse_library
from serve.engines.onnxruntime import load_runtime
from serve.predict.onnx_product import products_model
from serve.predict.products import SEED, Call, Product, Weights, timed

DTYPES = {"fp32": "float32", "fp16": "float16"}
"""Of an artifact's precision."""
WHY_NONE = (
    "ONNX Runtime's CPU kernels multiply zeros like any other number (those of --engine onnxruntime-sparse skip them)"
)
DENSE = "MatMul"
WHY_DENSE = "kernels that skip zeros are faster with at most {most:.0%} that are not zero, or in 2:4, in float32"
INSTEAD = (
    "; remove whole heads and neurons instead (--pattern structured), or deploy 2:4 on an NVIDIA GPU, at sizes where "
    "it pays (--engine torch-cuda there)"
)


class OnnxRuntimeProduct:
    """One session with every weight in it, and outputs that it writes in place."""

    def __init__(
        self, runtime: Any, weights: Weights, *, dtype: str, threads: int, skips: bool = False, few: bool = False
    ) -> None:
        """*skips*: by kernels that skip zeros, *few* as of sparse_graph; ``kernel`` says whether they do."""
        self._runtime, self._dtype, self._count = runtime, np.dtype(dtype), len(weights)
        self._width, self._inputs = weights[0].shape
        self.kernel = DENSE
        self.outputs: list[np.ndarray] = []
        """What the call of the last ``at`` writes: (tokens, outputs) for each weight."""
        model = products_model([weight.T.astype(dtype) for weight in weights])
        options = session_options(runtime, threads)
        if skips and (graph := sparse_graph(model, threads=threads, few=few)).content:
            register(options, runtime)
            self.kernel, model = " and ".join(sorted(set(graph.operators.values()))), graph.content
        try:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions have no common base but this
            reason = str(error).strip().splitlines()[0]
            raise EngineError(f"ONNX Runtime cannot multiply matrices of {dtype} here: {reason}.") from error

    def at(self, tokens: int) -> Call:
        """See Product."""
        random = np.random.default_rng(SEED)
        value = random.standard_normal((tokens, self._inputs), dtype=np.float32).astype(self._dtype)
        binding = self._session.io_binding()
        binding.bind_cpu_input("x", value)
        self.outputs = kept = [np.empty((tokens, self._width), dtype=self._dtype) for _ in range(self._count)]
        for index, place in enumerate(kept):
            binding.bind_output(f"y{index}", "cpu", 0, self._dtype, place.shape, place.ctypes.data)

        def run(_keep: object = (value, kept)) -> None:
            self._session.run_with_iobinding(binding)

        return timed(run)


class OnnxRuntimeProducts(Closing):
    """See serve.predict.products.Products."""

    def __init__(self, path: Path, *, threads: int, skips: bool) -> None:
        """*skips*: with kernels that skip zeros."""
        self._runtime, self._skips = load_runtime(), skips
        self.name = "onnxruntime-sparse" if skips else "onnxruntime-cpu"
        self._threads = threads or available_cpus()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        folder = path
        if path.is_dir() and not (path / "model.onnx").is_file():
            self._temporary = tempfile.TemporaryDirectory(prefix="pst-predict-")
            folder = Path(self._temporary.name) / "artifact"
            try:
                _export(path, folder)
            except EngineError:
                self._temporary.cleanup()
                raise
        precision = manifest.load(folder, verify=False).precision if (folder / FILE_NAME).is_file() else "fp32"
        if precision not in DTYPES:
            raise EngineError(
                f"{path} has the precision {precision}; give the artifact of the same model with --precision fp32."
            )
        self.dtype = DTYPES[precision]
        self._folder = folder
        self._engine = open_engine(folder, engine="onnxruntime", threads=self._threads)
        self._few = bool(cache_inputs(self._engine.inputs))
        self.why_none = (WHY_DENSE.format(most=densest(few=self._few)) if skips else WHY_NONE) + INSTEAD

    def model(self, batch: int, sequence: int) -> Call:
        """See Products."""
        workload = random_workload((batch, sequence), vocab_size=vocab_size(self._folder))
        feeds = workload.feeds_of(0, self._engine.inputs)
        return timed(lambda: self._engine.infer(feeds))

    def dense(self, weights: Weights) -> Product:
        """See Products."""
        return OnnxRuntimeProduct(self._runtime, weights, dtype=self.dtype, threads=self._threads)

    def sparse(self, spec: str, weights: Weights) -> Product | None:
        """Kernels that skip zeros, where they are asked for and there are enough of them."""
        if not self._skips or self.dtype != "float32":
            return None
        made = OnnxRuntimeProduct(
            self._runtime, weights, dtype=self.dtype, threads=self._threads, skips=True, few=self._few
        )
        return None if made.kernel == DENSE else made

    def close(self) -> None:
        """Close the model, and delete what was exported for it."""
        self._engine.close()
        if self._temporary is not None:
            self._temporary.cleanup()


def _export(path: Path, folder: Path) -> None:
    note(f"{path} is no ONNX artifact: it is exported for the measurement, and deleted afterwards.")
    command = [sys.executable, "-m", "cli", "export", str(path), "--output", str(folder)]
    if _is_pretrained(path):
        command += ["--task", "feature_extraction"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 130 or done.returncode < 0:
        raise KeyboardInterrupt
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason was given"]
        raise EngineError(
            f"ONNX Runtime needs {path} as ONNX, and pst export refuses it: {said[0].removeprefix('Error: ')}"
        )


def _is_pretrained(path: Path) -> bool:
    """Whether it is an encoder as pretraining leaves it, whose head no task keeps."""
    try:
        config = json.loads((resolve_model(path) / "config.json").read_text(encoding="utf-8"))
        named = config.get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return False  # pst export says what is wrong
    return any(str(name).endswith(("ForMaskedLM", "ForPreTraining")) for name in named)


def open_products(path: Path, *, variant: str, threads: int) -> OnnxRuntimeProducts:
    """On the CPU. Raises EngineError."""
    if variant == "sparse":
        sparse_library()
    elif variant not in ("", "cpu"):
        raise EngineError(
            "pst predict measures ONNX Runtime on the CPU alone: its CUDA kernels multiply zeros as well, so that a "
            "sparse model is as fast as a dense one. Choose onnxruntime, onnxruntime-sparse or torch-cuda."
        )
    return OnnxRuntimeProducts(path, threads=threads, skips=variant == "sparse")
