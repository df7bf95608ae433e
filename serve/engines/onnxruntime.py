"""ONNX Runtime on the CPU, and on an NVIDIA GPU through its CUDA provider, or its TensorRT provider.

Variants: ``onnxruntime`` and ``onnxruntime-cpu`` use the CPU, and so does ``onnxruntime-sparse``, with kernels of our
own that skip zeros (_onnxruntime_sparse.py). ``onnxruntime-cuda`` uses the GPU or nothing, and ``auto`` the GPU where
the installed package has the provider and it starts, else the CPU, with those kernels where an artifact has zeros
enough. ``onnxruntime-cuda-tf32`` lets float32 products round as tensor cores do, and ``onnxruntime-tensorrt`` gives
TensorRT what it can run of the graph.

On CUDA attention is one operator, buffers stay on the device and repeated shapes are CUDA graphs, see
_onnxruntime_cuda.py; where that cannot be, a note says why.
"""

import importlib
import importlib.metadata
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import ArtifactError, EngineError
from pst.progress import note
from serve.closing import Closing
from serve.describe import max_positions
from serve.engines import ANY_SHAPE, Array, Cache, Profiler, Shapes, TensorSpec, check_feeds
from serve.engines._onnxruntime_cache import OrtCache
from serve.engines._onnxruntime_cuda import FusedSessions
from serve.engines._onnxruntime_providers import (
    CPU,
    CUDA,
    TENSORRT,
    Providers,
    first_line,
    providers_of,
    session_options,
    with_graphs,
)
from serve.engines._onnxruntime_sparse import SparseGraph, SparseProfiler, may_skip_zeros, register, sparse_graph
from serve.engines._sparse_library import sparse_library

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
MISSING = (
    'ONNX Runtime is not installed; install it with: pip install "sparse-pst[cpu]" '
    '(or "sparse-pst[gpu]" on a machine with an NVIDIA GPU).'
)
DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip


def installed_distributions() -> list[str]:
    """Which of the two packages that bring a module named onnxruntime are installed."""
    found = []
    for name in DISTRIBUTIONS:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def load_runtime() -> Any:
    """The onnxruntime module. Raises EngineError where it is missing, or where two packages fight over its files."""
    if len(installed_distributions()) > 1:
        raise EngineError(
            "Both onnxruntime and onnxruntime-gpu are installed, and they overwrite each other's files; "
            "run: pip uninstall onnxruntime onnxruntime-gpu, then install the one that you want."
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        # A broken library, CUDA's for example, also raises ImportError: its own words then say more than ours.
        raise EngineError(
            MISSING if error.name == "onnxruntime" else f"ONNX Runtime does not load: {error}."
        ) from error


class OnnxRuntimeEngine(Closing):
    """An InferenceSession with the protocol of serve.engines.Engine."""

    def __init__(self, path: Path, *, variant: str, threads: int, shapes: Sequence[tuple[int, int]] = ()) -> None:
        runtime = load_runtime()
        file = path if path.is_file() else path / "model.onnx"
        if not file.is_file():
            raise ArtifactError(f"{path} holds no model.onnx; give an artifact folder that pst export wrote.")
        providers = providers_of(runtime, variant, file=file)
        start = time.perf_counter()
        self._runtime, self._file, self._asked = runtime, file, providers
        self.threads = threads
        self._sparse: SparseGraph | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if variant == "sparse":
            self._sparse = sparse_graph(file, threads=threads)
            count = len(self._sparse.held) + len(self._sparse.too_dense)
            note(f"{len(self._sparse.held)} of {count} products with weights of {file} skip zeros.")
        elif variant == "auto" and providers == [CPU]:
            self._sparse = self._sparse_graph_if_it_pays()
        self._session: Any = self._open_sparse(self._sparse) if self._sparse else self._open(str(file), False)
        used = self._session.get_providers()[0]
        _check_used(used, variant)
        self.inputs: Mapping[str, TensorSpec] = _specs(self._session.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = _specs(self._session.get_outputs())
        self.max_length = max_positions(file.parent)
        self._fused: FusedSessions | None = None
        if used == CUDA:
            plain, self._session = [self._session], None
            self._fused = FusedSessions(
                runtime, file, self._open, device="cuda", inputs=self.inputs, outputs=self.outputs,
                max_length=self.max_length, shapes=shapes, plain=plain,
            )  # fmt: skip
        self.load_ms = (time.perf_counter() - start) * 1000
        suffix = "-tf32" if variant == "cuda-tf32" else "-sparse" if self.sparse_weights else ""
        self.name = f"onnxruntime-{_device(used)}{suffix}"
        self._closed = False

    def _open(self, model: Any, graphs: bool) -> Any:
        """A session of a file name or of bytes."""
        providers = with_graphs(self._asked) if graphs else self._asked
        return _open_session(self._runtime, model, self._options(), providers, file=self._file)

    def _open_sparse(self, graph: SparseGraph) -> Any:
        """A session of *graph*, whose content is then gone: by way of a file, for of bytes a session keeps a copy."""
        content, graph.content = graph.content, b""
        if not content:
            return self._open(str(self._file), False)
        with tempfile.TemporaryDirectory(prefix="pst-sparse-") as folder:
            path = Path(folder) / "sparse.onnx"
            try:
                path.write_bytes(content)
            except OSError:  # no room there
                return self._open(content, False)
            del content
            return self._open(str(path), False)

    def _options(self) -> Any:
        options = session_options(self._runtime, self.threads)
        if self._sparse and self._sparse.held:
            register(options, self._runtime)
        return options

    def _sparse_graph_if_it_pays(self) -> SparseGraph | None:
        """Where export.json tells of weights that are sparse enough, and the kernels can be had; else why not."""
        if not may_skip_zeros(self._file.parent):
            return None
        try:
            sparse_library()
            return sparse_graph(self._file, threads=self.threads)
        except EngineError as error:
            note(f"Zeros are multiplied like any other number. {error}")
            return None

    def _sparse_file(self, graph: SparseGraph) -> Path:
        """The file of *graph*, until close. It is made once more, since the bytes of a session are not kept."""
        if not graph.held:
            return self._file
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory()
            made = sparse_graph(self._file, threads=self.threads)
            (Path(self._folder.name) / "sparse.onnx").write_bytes(made.content)
        return Path(self._folder.name) / "sparse.onnx"

    @property
    def sparse_weights(self) -> frozenset[str]:
        """Names of the weights whose zeros are skipped; none of a variant without ``sparse``."""
        return frozenset(self._sparse.held if self._sparse else ())

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises EngineError for feeds that do not fit, or when the runtime fails."""
        if self._closed:
            raise EngineError("The engine is closed; open it again.")
        check_feeds(self.inputs, feeds, max_length=self.max_length)
        names = list(self.outputs)
        try:
            if self._fused is not None:
                return self._fused.run(feeds)
            values = self._session.run(names, dict(feeds))
        except Exception as error:  # the runtime's exceptions have no common base but this
            raise EngineError(f"ONNX Runtime failed to run the model: {first_line(error)}.") from error
        return dict(zip(names, values, strict=True))

    def cache(self, past: Mapping[str, Array]) -> Cache:
        """See CachingEngine: OrtValues, fed back as they come."""
        return OrtCache(
            self._runtime, self._session_for, past, device="cpu" if self._fused is None else "cuda",
            inputs=self.inputs, max_length=self.max_length,
        )  # fmt: skip

    def _session_for(self, feeds: Mapping[str, Array]) -> Any:
        if self._closed:
            raise EngineError("The engine is closed; open it again.")
        return self._session if self._fused is None else self._fused.session_for(feeds)

    def profiler(self) -> Profiler:
        """See ProfilingEngine; on a GPU in a process of its own, which waits for every kernel."""
        if self._fused is not None:
            from serve.engines._onnxruntime_cuda_profile import CudaProfiler

            return CudaProfiler(self._file, self._fused.graph_file, providers=self._asked, threads=self.threads)
        if self._sparse:
            return SparseProfiler(
                self._runtime, self._sparse_file(self._sparse), self._sparse, original=self._file,
                options=self._options(), providers=self._asked,
            )  # fmt: skip
        if self.name.endswith("tensorrt"):
            raise EngineError("ONNX Runtime does not tell what its TensorRT provider runs; choose the engine tensorrt.")
        from serve.engines._onnxruntime_profile import OnnxRuntimeProfiler

        return OnnxRuntimeProfiler(
            self._runtime, self._file, options=session_options(self._runtime, self.threads), providers=self._asked
        )

    def close(self) -> None:
        """Drop the sessions and their memory."""
        self._closed, self._session, self._sparse = True, None, None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        if self._fused is not None:
            self._fused.close()


def _check_used(used: str, variant: str) -> None:
    """Raise EngineError where the runtime quietly fell back to another provider than the variant's."""
    if variant.startswith("cuda") and used != CUDA:
        raise EngineError(
            "ONNX Runtime's CUDA provider does not start on this machine; "
            "check the driver with nvidia-smi, or choose the engine onnxruntime."
        )
    if variant == "tensorrt" and used != TENSORRT:
        raise EngineError(
            "ONNX Runtime's TensorRT provider does not start on this machine: it needs TensorRT 10, which "
            "pip install tensorrt brings; or choose the engine onnxruntime-cuda."
        )


def _device(provider: str) -> str:
    return {CUDA: "cuda", TENSORRT: "tensorrt"}.get(provider, "cpu")


def _open_session(runtime: Any, model: Any, options: Any, providers: Providers, *, file: Path) -> Any:
    """A session of *model*, a file name or bytes, which come from *file*."""
    try:
        return runtime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # the runtime's exceptions have no common base but this
        kind, reason = type(error).__name__, first_line(error).rpartition(" failed:")[2]
        if any(words in str(error).lower() for words in ("external data", "external initializer", "model_path")):
            named = re.search(r'"([^"]+)"', str(error))
            other = f" ({Path(named[1]).name})" if named else ""
            raise ArtifactError(
                f"{file} keeps weights in a second file that is missing or damaged{other}; "
                "copy the whole folder again, or export again."
            ) from error
        if kind in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile", "NoModel") or "No graph was found" in str(error):
            raise ArtifactError(f"{file} is not a whole ONNX model ({reason}); export it again.") from error
        if kind == "NotImplemented":
            raise EngineError(
                f"ONNX Runtime {runtime.__version__} cannot compute {file} on this device: {reason}. "
                "Export it with --precision fp32."
            ) from error
        raise EngineError(
            f"ONNX Runtime {runtime.__version__} refuses {file}: {reason}. Export it again, or install a newer version."
        ) from error


def _specs(arguments: Any) -> dict[str, TensorSpec]:
    specs = {}
    for argument in arguments:
        # A dimension without a name comes as None: each is its own symbol, so that none must agree.
        shape = tuple(
            length if isinstance(length, int | str) else f"{argument.name}_{axis}"
            for axis, length in enumerate(argument.shape)
        )
        dtype = DTYPES.get(argument.type)
        if dtype is None:
            raise EngineError(f"{argument.name} has the type {argument.type}, which is not supported here.")
        assert np.dtype(dtype)
        specs[argument.name] = TensorSpec(name=argument.name, dtype=dtype, shape=shape)
    return specs


def open_path(path: Path, *, variant: str, threads: int, shapes: Shapes = ANY_SHAPE) -> OnnxRuntimeEngine:
    """Open an artifact folder or an ``.onnx`` file; serve.engines.open_engine calls this."""
    return OnnxRuntimeEngine(path, variant=variant, threads=threads, shapes=shapes.fixed)
