"""ONNX Runtime on the CPU, and on an NVIDIA GPU through its CUDA provider.

Variants: ``onnxruntime`` and ``onnxruntime-cpu`` use the CPU, ``onnxruntime-cuda`` the GPU or nothing, and ``auto`` the
GPU where the installed package has the provider and it starts.
"""

import importlib
import importlib.metadata
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pst.errors import ArtifactError, EngineError
from serve.describe import max_positions
from serve.engines import ANY_SHAPE, Array, Profiler, Shapes, TensorSpec, check_feeds

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
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


def _first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its prefix and its stack."""
    return str(error).strip().splitlines()[0].rpartition(" : ")[2].rstrip(". ")


class OnnxRuntimeEngine:
    """An InferenceSession with the protocol of serve.engines.Engine."""

    def __init__(self, path: Path, *, variant: str, threads: int) -> None:
        runtime = load_runtime()
        file = path if path.is_file() else path / "model.onnx"
        if not file.is_file():
            raise ArtifactError(f"{path} holds no model.onnx; give an artifact folder that pst export wrote.")
        providers = _providers(runtime, variant)
        start = time.perf_counter()
        self._runtime, self._file, self._asked = runtime, file, providers
        self._session: Any = _open_session(runtime, file, _options(runtime, threads), providers)
        self.load_ms = (time.perf_counter() - start) * 1000
        used = self._session.get_providers()[0]
        if variant == "cuda" and used != CUDA:
            raise EngineError(
                "ONNX Runtime's CUDA provider does not start on this machine; "
                "check the driver with nvidia-smi, or choose the engine onnxruntime."
            )
        self.name = f"onnxruntime-{'cuda' if used == CUDA else 'cpu'}"
        self.threads = threads
        self.inputs: Mapping[str, TensorSpec] = _specs(self._session.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = _specs(self._session.get_outputs())
        self.max_length = max_positions(file.parent)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises EngineError for feeds that do not fit, or when the runtime fails."""
        if self._session is None:
            raise EngineError("The engine is closed; open it again.")
        check_feeds(self.inputs, feeds, max_length=self.max_length)
        names = list(self.outputs)
        try:
            values = self._session.run(names, dict(feeds))
        except Exception as error:  # the runtime's exceptions have no common base but this
            raise EngineError(f"ONNX Runtime failed to run the model: {_first_line(error)}.") from error
        return dict(zip(names, values, strict=True))

    def profiler(self) -> Profiler:
        """See ProfilingEngine; on the CPU alone, because CUDA's kernels run on after their node has ended."""
        if self.name.endswith("cuda"):
            raise EngineError("ONNX Runtime does not tell the time of its CUDA kernels.")
        from serve.engines._onnxruntime_profile import OnnxRuntimeProfiler

        return OnnxRuntimeProfiler(
            self._runtime, self._file, options=_options(self._runtime, self.threads), providers=self._asked
        )

    def close(self) -> None:
        """Drop the session and its memory."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _options(runtime: Any, threads: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: its errors come as exceptions, and are said once
    # Otherwise idle threads spin for a while after an inference, and take the CPU from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _providers(runtime: Any, variant: str) -> list[str]:
    if variant not in ("", "cpu", "cuda", "auto"):
        raise EngineError(f"onnxruntime-{variant} is not an engine; choose onnxruntime or onnxruntime-cuda.")
    has_cuda = CUDA in runtime.get_available_providers()
    if variant == "cuda" and not has_cuda:
        raise EngineError(
            "The installed ONNX Runtime has no CUDA provider; "
            'run: pip uninstall onnxruntime, then: pip install "sparse-pst[gpu]".'
        )
    if variant in ("cuda", "auto") and has_cuda:
        if hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()  # finds CUDA's and cuDNN's libraries where pip put them
        return [CUDA, CPU]
    return [CPU]


def _open_session(runtime: Any, file: Path, options: Any, providers: list[str]) -> Any:
    try:
        return runtime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # the runtime's exceptions have no common base but this
        kind, reason = type(error).__name__, _first_line(error).rpartition(" failed:")[2]
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
    """Open an artifact folder or an ``.onnx`` file; serve.engines.open_engine calls this. Any shape will do."""
    return OnnxRuntimeEngine(path, variant=variant, threads=threads)
