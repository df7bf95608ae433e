"""TensorRT plans of an artifact, built with whichever TensorRT is there, and kept beside the artifact.

The one module that knows how the versions differ:

    8.6            weakly typed: explicit batch is a flag, and half types in the graph have to be allowed by a flag
    10             strongly typed on request, so that types are the graph's; explicit batch is the only kind
    11             strongly typed always; the flags that allowed half types are gone
    TensorRT-RTX   strongly typed always; builds without a GPU, for a compute capability that it is told, and measures
                   nothing, so that there is no timing cache

A plan runs on the runtime version and the kind of GPU that it was built for, so both are in its name; what was built is
in a JSON file of the same name. TensorRT's timings are kept per version and GPU, for a quicker second build.

Sources: https://docs.nvidia.com/deeplearning/tensorrt/latest/api/migration/tensorrt-10x-to-11x-python-api-reference.html
and the Python API's NetworkDefinitionCreationFlag. Needs no torch and no onnx. Only TensorRT-RTX is run by the tests.
"""

import hashlib
import importlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.manifest import MODEL_NAME, Manifest, TensorInfo
from pst.errors import ConfigError, EngineError
from pst.files import atomic_file, read_json, sha256, write_json
from pst.progress import note

RUNTIMES = ("tensorrt", "tensorrt_rtx")
"""Packages that build plans, the first that is installed being the default."""
FOLDER = "plans"
"""Of the plans, inside the artifact's folder."""
NO_GPU = "none"
_INSTALL = (
    "pip install tensorrt (a GPU is needed to build), or pip install tensorrt-rtx (for RTX GPUs; builds without one)"
)
_PAST_LENGTH = "past_sequence_length"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes that a plan takes, (batch, tokens) each: the smallest, the one it is tuned for, the largest."""

    smallest: tuple[int, int]
    usual: tuple[int, int]
    largest: tuple[int, int]

    def __post_init__(self) -> None:
        """Raise ConfigError unless the three grow."""
        for place in (0, 1):
            if not 1 <= self.smallest[place] <= self.usual[place] <= self.largest[place]:
                raise ConfigError(
                    f"The profile {self} does not grow; give the smallest, the usual and the largest shape, "
                    "for example 1x1,8x128,32x128."
                )

    def __str__(self) -> str:
        """As typed: 1x1,8x128,32x512."""
        return ",".join(f"{batch}x{length}" for batch, length in (self.smallest, self.usual, self.largest))

    def shapes(self, tensor: TensorInfo) -> tuple[tuple[int, ...], ...]:
        """The three shapes of an input; of a decoder's cache the first is empty, so that it can read a prompt."""
        return tuple(
            tuple(size if isinstance(size, int) else _length(size, shape, place) for size in tensor.shape)
            for place, shape in enumerate((self.smallest, self.usual, self.largest))
        )


def _length(name: str, shape: tuple[int, int], place: int) -> int:
    batch, tokens = shape
    past = 0 if place == 0 else tokens
    return sum({"batch_size": batch, _PAST_LENGTH: past}.get(part, tokens) for part in name.split(" + "))


def parse_profile(text: str | None, *, max_length: int) -> Profile:
    """The profile that *text* spells, BATCHxTOKENS three times; None is 1 to 32 rows, of up to *max_length* tokens.

    Raises ConfigError for another form, or more tokens than the model reads.
    """
    if text is None:
        text = f"1x1,8x{min(128, max_length)},32x{max_length}"
    try:
        shapes = [(int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(","))]
        smallest, usual, largest = shapes
    except ValueError:
        raise ConfigError(
            f"The profile {text!r} is not three shapes BATCHxTOKENS; give for example 1x1,8x128,32x128."
        ) from None
    profile = Profile(smallest=smallest, usual=usual, largest=largest)
    if largest[1] > max_length:
        raise ConfigError(f"The profile {text} goes beyond the model's {max_length} tokens; give fewer.")
    return profile


def find_runtime(name: str | None = None) -> Any:
    """The module of TensorRT or TensorRT-RTX. Raises EngineError where neither (or not *name*) can be loaded."""
    for candidate in (name,) if name else RUNTIMES:
        try:
            return importlib.import_module(str(candidate))
        except ImportError:
            continue
        except Exception as error:  # a wheel whose libraries do not fit the driver
            raise EngineError(f"{candidate} is installed, but cannot be loaded ({error}); install it again.") from error
    raise EngineError(f"{name or 'TensorRT'} is not installed, so that no plan can be built; install it: {_INSTALL}.")


def find_gpu() -> str:
    """The first GPU's name and compute capability, as its driver says; NO_GPU where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return NO_GPU
    return found.splitlines()[0] if found else NO_GPU


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """All that decides what a plan is. Two that are equal stand for one plan."""

    model: str
    """SHA-256 of model.onnx, and of its external data where it has some."""
    runtime: str
    version: str
    gpu: str
    target: str
    """Compute capability that was asked for, such as SM80; empty for the GPU that is there."""
    profile: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """A file name without its ending."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.runtime}-{self.version}-{digest[:16]}"


def plan_of(
    artifact: Path,
    *,
    profile: Profile | None = None,
    runtime: str | None = None,
    target: str = "",
    sparse: bool | None = None,
) -> Path:
    """The plan of an *artifact* folder, from its cache or built now.

    runtime: one of RUNTIMES, None for the first that is installed. target: a compute capability of TensorRT-RTX (SM75,
    SM80, SM86, SM89, SM120); without a GPU, SM80 stands for an empty one. sparse: let the builder choose kernels for
    2:4 weights; None is whether any weight is said to be 2:4.

    Raises EngineError where no runtime is installed or it refuses the model, ConfigError for options that it does not
    know, ArtifactError for a damaged artifact.
    """
    manifest = Manifest.load(artifact)
    trt = find_runtime(runtime)
    profile = profile or parse_profile(None, max_length=manifest.max_length)
    gpu = find_gpu()
    target = target or ("SM80" if gpu == NO_GPU and _is_rtx(trt) else "")
    if target and not _is_rtx(trt):
        raise ConfigError(
            f"{trt.__name__} builds for the GPU that is there; leave the compute capability {target} out."
        )
    if sparse is None:
        sparse = any((weight.pattern or manifest.pattern) in ("2:4", "1:4") for weight in manifest.weights)
    key = PlanKey(
        model="".join(digest for name, digest in sorted(manifest.files.items()) if name.startswith(MODEL_NAME)),
        runtime=trt.__name__, version=trt.__version__, gpu=gpu, target=target, profile=str(profile),
        flags=("sparse_weights",) if sparse else (),
    )  # fmt: skip
    folder = artifact / FOLDER
    plan, record = folder / f"{key.name}.plan", folder / f"{key.name}.json"
    if plan.is_file() and record.is_file():
        if read_json(record, EngineError, "delete it, to build the plan again.").get("sha256") == sha256(plan):
            note(f"{plan} is built already.")
            return plan
        note(f"{plan} is damaged; building it again.")
    timings = folder / f"{key.runtime}-{key.version}-{hashlib.sha256(gpu.encode()).hexdigest()[:8]}.timing"
    note(f"Building a plan with {key.runtime} {key.version} for {target or gpu}, shapes {profile} ...")
    content = build_plan(
        artifact / MODEL_NAME,
        manifest,
        trt=trt,
        profile=profile,
        target=target,
        sparse=sparse,
        timings=None if _is_rtx(trt) else timings,
    )
    folder.mkdir(exist_ok=True)
    with atomic_file(plan) as partial:
        partial.write_bytes(content)
    write_json(record, {**asdict(key), "sha256": sha256(plan), "bytes": len(content)})
    return plan


def build_plan(
    model: Path,
    manifest: Manifest,
    *,
    trt: Any,
    profile: Profile,
    target: str = "",
    sparse: bool = False,
    timings: Path | None = None,
) -> bytes:
    """A serialized plan of the ONNX file *model*; *timings* is a timing cache, read where it is there and written.

    Raises EngineError where *trt* cannot start, refuses the model or a shape; its own words are in the message.
    """
    messages: list[str] = []
    log = _logger(trt, messages)

    def refused(what: str, remedy: str) -> EngineError:
        said = messages[-1] if messages else "it gives no reason"
        return EngineError(f"{trt.__name__} {trt.__version__} {what} ({said}); {remedy}")

    try:
        builder = trt.Builder(log)
        config = builder.create_builder_config()
        network = builder.create_network(_network_flags(trt))
    except (RuntimeError, TypeError, AttributeError) as error:  # without a driver the builder is None or raises
        raise refused("cannot start", "it needs a GPU and its driver, or use tensorrt-rtx.") from error
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        messages.extend(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise refused(f"does not read {model}", "export again with another --opset, --precision or --linear-form.")
    _set_flags(trt, config, manifest, sparse=sparse)
    if target:
        _set_target(trt, config, target)
    shapes = builder.create_optimization_profile()
    for tensor in manifest.inputs:
        shapes.set_shape(tensor.name, *profile.shapes(tensor))
    if config.add_optimization_profile(shapes) < 0:
        raise refused(f"does not take the profile {profile}", "give other shapes.")
    cache = _timing_cache(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refused(f"cannot build a plan of {model}", "give smaller shapes, or export with another --linear-form.")
    if cache is not None and timings is not None:
        timings.parent.mkdir(exist_ok=True)
        with atomic_file(timings) as partial:
            partial.write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def _is_rtx(trt: Any) -> bool:
    return bool(trt.__name__ == "tensorrt_rtx")


def _logger(trt: Any, messages: list[str]) -> Any:
    """TensorRT's log, of which errors go to *messages*; the standard error stream stays ours."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)

    return Log()


def _network_flags(trt: Any) -> int:
    flags = trt.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if hasattr(flags, "STRONGLY_TYPED") else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, name))


def _set_flags(trt: Any, config: Any, manifest: Manifest, *, sparse: bool) -> None:
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or manifest.precision == "fp32":
        return
    flag = getattr(trt.BuilderFlag, manifest.precision.upper(), None)
    if flag is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} has no {manifest.precision}; export with --precision fp16, or update it."
        )
    config.set_flag(flag)


def _set_target(trt: Any, config: Any, target: str) -> None:
    known: Mapping[str, Any] = trt.ComputeCapability.__members__
    if target not in known:
        raise ConfigError(f"{trt.__name__} knows no compute capability {target!r}; use one of {', '.join(known)}.")
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[target], 0)


def _timing_cache(config: Any, timings: Path | None) -> Any:
    """The timing cache that a build adds to, filled from the file *timings* where it is there and fits."""
    if timings is None:
        return None
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None
