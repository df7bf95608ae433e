"""Where ONNX Runtime computes: providers of each variant of the engine, options of a session, and what it says."""

import hashlib
from pathlib import Path
from typing import Any

from export import manifest
from pst.errors import EngineError
from pst.files import cache_folder

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
VARIANTS = ("", "cpu", "sparse", "auto", "cuda", "cuda-tf32", "tensorrt")

Providers = list[Any]
"""Names, or pairs of a name and its options."""


def providers_of(runtime: Any, variant: str, *, file: Path) -> Providers:
    """The providers to ask for, best first. Raises EngineError where the installed package has not what is needed."""
    if variant not in VARIANTS:
        names = ", ".join(f"onnxruntime-{name}" for name in VARIANTS if name not in ("", "auto"))
        raise EngineError(f"onnxruntime-{variant} is not an engine; choose onnxruntime or one of {names}.")
    available = runtime.get_available_providers()
    wanted = {"": CPU, "cpu": CPU, "sparse": CPU, "tensorrt": TENSORRT}.get(variant, CUDA)
    if wanted not in available:
        if variant == "auto":
            return [CPU]
        raise EngineError(
            f"The installed ONNX Runtime has no {'TensorRT' if wanted == TENSORRT else 'CUDA'} provider; "
            'run: pip uninstall onnxruntime, then: pip install "sparse-pst[gpu]".'
        )
    if wanted == CPU:
        return [CPU]
    if hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # finds CUDA's and cuDNN's libraries where pip put them
    on_cuda = (CUDA, cuda_options(tf32=variant == "cuda-tf32"))
    if wanted == TENSORRT:
        return [(TENSORRT, tensorrt_options(runtime, file)), on_cuda, CPU]
    return [on_cuda, CPU]


def cuda_options(*, tf32: bool) -> dict[str, str]:
    """Options of the CUDA provider.

    *tf32*: products of float32 may round their factors to 10 bits; ONNX Runtime's own default, PyTorch's is not to. The
    sums of a normalization are taken in float32 whatever its type, as ONNX defines it; ONNX Runtime's default is to
    take them in fp16 where it fuses.
    """
    return {"device_id": "0", "use_tf32": str(int(tf32)), "enable_skip_layer_norm_strict_mode": "1"}


def with_graphs(providers: Providers) -> Providers:
    """*providers*, that of CUDA with CUDA graphs."""
    return [
        (each[0], each[1] | {"enable_cuda_graph": "1"}) if isinstance(each, tuple) and each[0] == CUDA else each
        for each in providers
    ]


def tensorrt_options(runtime: Any, file: Path) -> dict[str, str]:
    """Options of the TensorRT provider: the artifact's own precision, sparse kernels, and plans kept for the next time.

    Plans lie in ``$XDG_CACHE_HOME/sparse-pst``, in a folder for this file and this version of ONNX Runtime.
    """
    precision = (
        manifest.load(file.parent, verify=False).precision if (file.parent / manifest.FILE_NAME).is_file() else ""
    )
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
    folder = cache_folder() / "onnxruntime-tensorrt" / f"{digest}-{runtime.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "device_id": "0",
        "trt_fp16_enable": str(precision == "fp16"),
        "trt_sparsity_enable": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }


def session_options(runtime: Any, threads: int) -> Any:
    """onnxruntime.SessionOptions for *threads* of the CPU."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: its errors come as exceptions, and are said once
    # Otherwise idle threads spin for a while after an inference, and take the CPU from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def first_line(error: Exception) -> str:
    """What ONNX Runtime says, without its prefix and its stack."""
    return str(error).strip().splitlines()[0].rpartition(" : ")[2].rstrip(". ")
