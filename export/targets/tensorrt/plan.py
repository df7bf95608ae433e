"""Plans and their cache: beside the artifact, in the folder plans, a JSON file of the same name saying what was built.

A plan runs on the runtime version and the kind of GPU that it was built for, so both are in its name, as are the shapes
that it takes. TensorRT's timings of kernels are kept per version and GPU, shared by all artifacts, so that models of
the same shapes build quickly once one of them is built: in $XDG_CACHE_HOME/sparse-pst, or ~/.cache/sparse-pst.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.manifest import MODEL_NAME, Manifest
from export.targets.tensorrt import versions
from export.targets.tensorrt.profiles import Profile, parse_profile
from pst.errors import ConfigError, EngineError, StorageError
from pst.files import atomic_file, cache_folder, read_json, sha256, write_json
from pst.progress import note

FOLDER = "plans"
"""Of the plans, inside the artifact's folder."""
_REMEDY = "delete it, to build the plan again."


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
    profiles: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """A file name without its ending."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.runtime}-{self.version}-{digest[:16]}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan on disk."""

    path: Path
    profiles: tuple[Profile, ...]
    """In the plan's order."""
    record: Mapping[str, Any]
    """The JSON file beside it: its PlanKey, sha256, bytes, seconds that the build took, and sparsity, the lines of the
    builder's log that say which layers are eligible for sparse kernels, and for which one was chosen."""


def plan_of(
    artifact: Path,
    *,
    profiles: Sequence[Profile] = (),
    runtime: str | None = None,
    target: str = "",
    sparse: bool | None = None,
    again: bool = False,
) -> Plan:
    """The plan of an *artifact* folder, from its cache or built now.

    profiles: the shapes that it has to take, and may be tuned for others as well; none is whatever was built for this
    runtime and GPU with one profile from 1x1 on, else parse_profile's default. runtime: one of RUNTIMES, None for
    the first that is installed. target: a compute capability of TensorRT-RTX (SM75, SM80, SM86, SM89, SM120); without a
    GPU, SM80 stands for an empty one. sparse: let the builder choose kernels for 2:4 weights; None is whether any
    weight is said to be 2:4. again: build it even if it is there.

    Raises EngineError where no runtime is installed or it refuses the model, ConfigError for options that it does not
    know, ArtifactError for a damaged artifact.
    """
    manifest = Manifest.load(artifact)
    trt = versions.find_runtime(runtime)
    gpu = versions.find_gpu()
    rtx = versions.is_rtx(trt)
    target = target or ("SM80" if gpu == versions.NO_GPU and rtx else "")
    if target and not rtx:
        raise ConfigError(
            f"{trt.__name__} builds for the GPU that is there; leave the compute capability {target} out."
        )
    if sparse is None:
        sparse = any((weight.pattern or manifest.pattern) in versions.SPARSE_PATTERNS for weight in manifest.weights)
    folder = artifact / FOLDER
    key = PlanKey(
        model="".join(digest for name, digest in sorted(manifest.files.items()) if name.startswith(MODEL_NAME)),
        runtime=trt.__name__, version=trt.__version__, gpu=gpu, target=target, profiles=(),
        flags=("sparse_weights",) if sparse else (),
    )  # fmt: skip
    wanted = () if again else _built(folder, key, tuple(profiles))
    wanted = wanted or tuple(profiles) or (parse_profile(None, max_length=manifest.max_length),)
    key = PlanKey(**{**asdict(key), "profiles": tuple(map(str, wanted)), "flags": key.flags})
    plan, record = folder / f"{key.name}.plan", folder / f"{key.name}.json"
    if plan.is_file() and record.is_file() and not again:
        content = read_json(record, EngineError, _REMEDY)
        if content.get("sha256") == sha256(plan):
            note(f"{plan} is built already.")
            return Plan(path=plan, profiles=wanted, record=content)
        note(f"{plan} is damaged; building it again.")
    note(
        f"Building a plan with {key.runtime} {key.version} for {target or gpu}, shapes {' and '.join(key.profiles)} ..."
    )
    start, sparsity = time.perf_counter(), list[str]()
    built = build_plan(
        artifact / MODEL_NAME, manifest, trt=trt, profiles=wanted, target=target, sparse=sparse,
        timings=None if rtx else cache_folder() / _timings(key), sparsity=sparsity,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    with atomic_file(plan) as partial:
        partial.write_bytes(built)
    write_json(
        record,
        {
            **asdict(key), "shapes": [profile.to_json() for profile in wanted], "sha256": sha256(plan),
            "bytes": len(built), "seconds": round(time.perf_counter() - start, 1), "sparsity": sparsity,
        },
    )  # fmt: skip
    return Plan(path=plan, profiles=wanted, record=read_json(record, EngineError, _REMEDY))


def _timings(key: PlanKey) -> str:
    return f"{key.runtime}-{key.version}-{hashlib.sha256(key.gpu.encode()).hexdigest()[:8]}.timing"


def _built(folder: Path, key: PlanKey, wanted: tuple[Profile, ...]) -> tuple[Profile, ...]:
    """The profiles of the newest plan that is like *key* and has just *wanted*, or else has more; empty without any.

    They are in that plan's order, which need not be that of *wanted*.
    Without any that are wanted: of one that takes all shapes from 1x1 on, so that what ``pst export --format tensorrt
    --profile`` built is found by whoever opens the artifact.
    """
    found: list[tuple[Profile, ...]] = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            record = read_json(path, EngineError, _REMEDY)
        except EngineError:  # of another plan, which is not asked for here
            continue
        like = {**asdict(key), "profiles": record.get("profiles"), "flags": list(key.flags)}
        if any(record.get(name) != value for name, value in like.items()) or "shapes" not in record:
            continue
        profiles = tuple(Profile.from_json(each) for each in record["shapes"])
        anything = len(profiles) == 1 and profiles[0].smallest == (1, 1) and not profiles[0].is_fixed
        if set(wanted) <= set(profiles) if wanted else anything:
            found.append(profiles)
    just = (profiles for profiles in found if set(profiles) == set(wanted))
    return next(just, next(iter(found), ()))


def build_plan(
    model: Path,
    manifest: Manifest,
    *,
    trt: Any,
    profiles: Sequence[Profile],
    target: str = "",
    sparse: bool = False,
    timings: Path | None = None,
    sparsity: list[str] | None = None,
) -> bytes:
    """A serialized plan of the ONNX file *model*, with an optimization profile for each of *profiles*.

    timings: a timing cache, read where it is there and written. sparsity: gets the log's lines about sparse kernels.
    Raises EngineError where *trt* cannot start, refuses the model or a shape; its own words are in the message.
    """
    messages: list[str] = []
    log = versions.logger(trt, messages, sparsity=sparsity)

    def refused(what: str, remedy: str) -> EngineError:
        said = messages[-1] if messages else "it gives no reason"
        return EngineError(f"{trt.__name__} {trt.__version__} {what} ({said}); {remedy}")

    try:
        builder = trt.Builder(log)
        config = builder.create_builder_config()
        network = builder.create_network(versions.network_flags(trt))
    except (RuntimeError, TypeError, AttributeError) as error:  # without a driver the builder is None or raises
        raise refused("cannot start", "it needs a GPU and its driver, or use tensorrt-rtx.") from error
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        messages.extend(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise refused(f"does not read {model}", "export again with another --opset, --precision or --linear-form.")
    versions.set_flags(trt, config, manifest, sparse=sparse)
    versions.set_details(trt, config)
    if target:
        versions.set_target(trt, config, target)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for tensor in manifest.inputs:
            shapes.set_shape(tensor.name, *profile.shapes(tensor))
        if config.add_optimization_profile(shapes) < 0:
            raise refused(f"does not take the profile {profile}", "give other shapes.")
    cache = versions.timing_cache(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refused(f"cannot build a plan of {model}", "give smaller shapes, or export with another --linear-form.")
    if cache is not None and timings is not None:
        _save(cache, timings)
    return bytes(plan)


def _save(cache: Any, timings: Path) -> None:
    try:
        with atomic_file(timings) as partial:
            partial.write_bytes(bytes(cache.serialize()))
    except StorageError as error:
        note(f"Timings of kernels are not kept, so that the next plan takes as long to build: {error}")
