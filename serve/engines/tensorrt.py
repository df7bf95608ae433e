"""TensorRT on an NVIDIA GPU: runs the plan of an artifact that ``pst export`` wrote, and builds it where there is none.

Variants: ``tensorrt`` (8.6, 10 or 11) and ``tensorrt-rtx`` (TensorRT-RTX, for RTX GPUs). Device memory is handled
through cuda-python. What the versions differ in is in export/targets/tensorrt/versions.py; a plan's cache in plan.py.

A plan has one optimization profile for each shape that it was opened for, and a wide one where others are run as well;
an inference takes the narrowest that fits. Each has a context of its own (serve/engines/_tensorrt_lane.py), made on
first use; since they run one after the other, they share the device memory for what lies between inputs and outputs.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.manifest import FILE_NAME, MODEL_NAME, Manifest
from export.targets.tensorrt import Plan, plan_of, versions
from export.targets.tensorrt.profiles import run_profiles
from pst.errors import ArtifactError, EngineError
from pst.progress import note
from serve.closing import Closing
from serve.describe import max_positions
from serve.engines import ANY_SHAPE, MAY_BE_EMPTY, Array, Profiler, Shapes, TensorSpec, check_feeds
from serve.engines._cuda import Cuda, load_bindings
from serve.engines._tensorrt_cache import Pool, TensorRTCache
from serve.engines._tensorrt_lane import Lane, Port, bounds_of, fits, width

PACKAGES = {"": "tensorrt", "rtx": "tensorrt_rtx"}
"""By variant."""


class TensorRTEngine(Closing):
    """A plan with the protocol of serve.engines.Engine."""

    def __init__(
        self, path: Path, *, variant: str, threads: int, shapes: Shapes = ANY_SHAPE, plan: Plan | None = None,
        timer: Any = None,
    ) -> None:  # fmt: skip
        """Load the plan of the artifact *path*, from its cache or built now; *plan* is one that is known already.

        timer: a trt.IProfiler that is told the time of each layer; CUDA graphs are then off.
        """
        if variant not in PACKAGES:
            raise EngineError(f"tensorrt-{variant} is not an engine; choose tensorrt or tensorrt-rtx.")
        if not (path / MODEL_NAME).is_file() or not (path / FILE_NAME).is_file():
            raise ArtifactError(
                f"{path} is no artifact folder; the engine tensorrt wants one that pst export wrote, with {MODEL_NAME} "
                f"and {FILE_NAME}."
            )
        self._trt = versions.find_runtime(PACKAGES[variant])
        load_bindings()  # before minutes of building
        self._cuda: Cuda | None = Cuda()
        self.name = f"{self._trt.__name__.replace('_', '-')}-{self._trt.__version__}"
        self.threads = threads
        self.artifact, self.shapes, self.variant = path, shapes, variant
        self._timer = timer
        self._errors: list[str] = []
        self._log = versions.logger(self._trt, self._errors)
        self._lanes: dict[int, Lane] = {}
        self._workspace = 0
        self.pool = Pool(self._cuda)
        """Of what a decoder's cache needs."""
        self._runtime: Any = None
        self._model: Any = None
        try:
            self.manifest = Manifest.load(path, verify=False)
            self.plan, self._model, self.load_ms = self._load(plan)
            self._inputs, self._outputs = self._ports()
        except BaseException:
            self.close()
            raise
        self.plan_bytes = self.plan.path.stat().st_size
        """Of the plan that runs, in bytes."""
        self.inputs: Mapping[str, TensorSpec] = _specs(self.manifest.inputs)
        self.outputs: Mapping[str, TensorSpec] = _specs(self.manifest.outputs)
        self.max_length = max_positions(path)
        self._bounds = [bounds_of(self.manifest.inputs, profile) for profile in self.plan.profiles]
        self._order = sorted(range(len(self._bounds)), key=lambda index: width(self._bounds[index]))
        self._lane: Lane | None = None  # of the last inference, for which alone the next two hold
        self._key: tuple[tuple[int, ...], ...] = ()
        self._kinds: list[tuple[tuple[int, ...], Any]] = []

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises EngineError for feeds that do not fit, or when the runtime fails."""
        if self._cuda is None:
            raise EngineError("The engine is closed; open it again.")
        try:
            kinds = [(feeds[name].shape, feeds[name].dtype) for name in self.inputs]
        except (KeyError, AttributeError):
            kinds = []
        if kinds != self._kinds or len(feeds) != len(kinds):  # else they were found right the last time
            self._kinds = []
            check_feeds(self.inputs, feeds, max_length=self.max_length)
            self._lane = self.lane({name: feeds[name].shape for name in self.inputs})
            self._key = tuple(shape for shape, _ in kinds)
            self._kinds = kinds
        assert self._lane is not None
        return self._lane.run(self._key, feeds)

    def lane(self, shapes: Mapping[str, tuple[int, ...]]) -> Lane:
        """What runs inputs of these shapes, made on first use.

        Raises EngineError where no profile takes them, or once the engine is closed.
        """
        cuda = self.cuda
        index = next((index for index in self._order if fits(self._bounds[index], shapes)), None)
        if index is None:
            first = next(iter(self.inputs))
            raise EngineError(
                f"The plan takes the shapes {' and '.join(map(str, self.plan.profiles))} (batch x tokens), but "
                f"{first} is {' x '.join(map(str, shapes[first]))}; give smaller batches, or build a plan for "
                "it: pst export --format tensorrt --profile."
            )
        if index not in self._lanes:
            self._lanes[index] = self._new_lane(cuda, index)
        return self._lanes[index]

    def cache(self, past: Mapping[str, Array]) -> TensorRTCache:
        """See CachingEngine: a decoder's cache of *past*, which stays on the GPU."""
        return TensorRTCache.of(self, past)

    @property
    def cuda(self) -> Cuda:
        """The GPU. Raises EngineError once the engine is closed."""
        if self._cuda is None:
            raise EngineError("The engine is closed; open it again.")
        return self._cuda

    @property
    def prepared_shapes(self) -> tuple[tuple[int, int], ...]:
        """See PreparedEngine; none of a decoder, whose prompts and steps are no batches to be filled up."""
        return tuple(each.usual for each in self.plan.profiles if each.is_fixed and each.past is None)

    def input_types(self) -> dict[str, str]:
        """numpy's names of what the plan itself takes, by input: int32 for int64 in TensorRT 8.6."""
        return {port.name: port.dtype for port in self._inputs}

    def inspector(self) -> Any:
        """TensorRT's EngineInspector of the plan."""
        return self._model.create_engine_inspector()

    def profiler(self) -> Profiler:
        """See ProfilingEngine."""
        from serve.engines._tensorrt_profile import TensorRTProfiler

        return TensorRTProfiler(self)

    def close(self) -> None:
        """Free the plan, its contexts and all memory."""
        cuda, self._cuda = self._cuda, None
        if cuda is None:
            return
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self._lane = None
        self.pool.close()
        self._model = self._runtime = None
        if self._workspace:
            cuda.free(self._workspace)
        cuda.close()

    def __del__(self) -> None:
        """Of whoever forgot to close it: memory of the GPU is not Python's to collect."""
        if hasattr(self, "_lanes"):
            self.close()

    def _load(self, plan: Plan | None) -> tuple[Plan, Any, float]:
        """The plan, deserialized, and the milliseconds that it took; one that does not fit is built again, once."""
        for again in (False, True):
            found = plan if plan is not None and not again else self._plan(again=again)
            content = found.path.read_bytes()
            start = time.perf_counter()
            self._runtime = self._trt.Runtime(self._log)
            model = self._runtime.deserialize_cuda_engine(content)
            if model is not None:
                return found, model, (time.perf_counter() - start) * 1000
            if versions.is_rtx(self._trt):
                raise self._failure("does not load the plan", remedy="it runs on RTX GPUs alone: choose tensorrt.")
            if not again:
                note(f"{found.path} does not fit this machine; building it again.")
        raise self._failure("does not load the plan that it built")

    def _plan(self, *, again: bool) -> Plan:
        manifest = self.manifest
        cached = any(MAY_BE_EMPTY in tensor.shape for tensor in manifest.inputs)
        profiles = run_profiles(
            self.shapes.fixed, others=self.shapes.others, max_length=manifest.max_length, cached=cached,
            new_tokens=self.shapes.new_tokens, spanned=self.shapes.spanned,
        )  # fmt: skip
        return plan_of(
            self.artifact, profiles=profiles if self.shapes.fixed else (), runtime=PACKAGES[self.variant], again=again
        )

    def _ports(self) -> tuple[list[Port], list[Port]]:
        ports = []
        for tensor in (*self.manifest.inputs, *self.manifest.outputs):
            found = versions.numpy_type(self._model.get_tensor_dtype(tensor.name))
            if found is None:
                raise EngineError(
                    f"{tensor.name} has a type that numpy has not, so that it cannot be given or read; export the "
                    "model with --precision fp16."
                )
            ports.append(Port(name=tensor.name, dtype=found, outside=tensor.dtype))
        inputs = len(self.manifest.inputs)
        return ports[:inputs], ports[inputs:]

    def _new_lane(self, cuda: Cuda, index: int) -> Lane:
        context = versions.new_context(self._trt, self._model, self._share)
        if context is None:
            raise self._failure("cannot make a context")
        if self._timer is not None:
            context.profiler = self._timer
        return Lane(
            cuda, context, profile=index, inputs=self._inputs, outputs=self._outputs, failure=self._failure,
            graphs=self._timer is None,
        )  # fmt: skip

    def _share(self, size: int) -> int:
        """Memory that all contexts use: each asks for the same size, that of the plan's largest need."""
        if not self._workspace:
            self._workspace = self.cuda.allocate(size)
        return self._workspace

    def _failure(self, what: str, *, remedy: str = "delete the artifact's folder plans, and try again.") -> EngineError:
        """In TensorRT's own words as well, where it had some."""
        said = f" ({self._errors[-1].strip()})" if self._errors else ""
        return EngineError(f"{self._trt.__name__} {self._trt.__version__} {what}{said}; {remedy}")


def _specs(tensors: Any) -> dict[str, TensorSpec]:
    return {
        tensor.name: TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for tensor in tensors
    }


def open_path(path: Path, *, variant: str, threads: int, shapes: Shapes = ANY_SHAPE) -> TensorRTEngine:
    """Open an artifact folder; serve.engines.open_engine calls this."""
    return TensorRTEngine(path, variant=variant, threads=threads, shapes=shapes)
