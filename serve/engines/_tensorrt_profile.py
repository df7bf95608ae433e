"""The time of each layer of a TensorRT plan, and what became of each weight's zeros.

The plan is opened once more, with TensorRT's own profiler on and without CUDA graphs. Which layers are eligible for
sparse kernels, and for which one was chosen, is in the log of the build, kept in the plan's record, and in what the
plan tells of its layers.
"""

import json
from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from export.manifest import MODEL_NAME, WeightInfo
from export.targets.tensorrt import versions
from pst.errors import EngineError
from serve.engines import Array, LayerTime, Verdict
from serve.engines._onnx_nodes import read_nodes
from serve.engines._tensorrt_layers import LayerMap, plain_name

if TYPE_CHECKING:
    from serve.engines.tensorrt import TensorRTEngine

WARMUP = 2
"""Inferences that do not count."""
SMALL = 1024
"""Rows or columns below which sparse kernels of the GPUs so far rarely pay (NVIDIA/TensorRT issues 3849 and 4065)."""
SPARSE_TYPES = ("fp16", "int8")
"""That NVIDIA documents sparse kernels for."""
REMOVE = "remove whole heads and neurons (--pattern structured), which is faster on every runtime"


class TensorRTProfiler:
    """See serve.engines.Profiler."""

    def __init__(self, engine: "TensorRTEngine") -> None:
        trt = versions.find_runtime("tensorrt_rtx" if engine.variant else "tensorrt")
        self._runs: list[dict[str, float]] = []
        self._trt = trt
        self._engine = type(engine)(
            engine.artifact, variant=engine.variant, threads=engine.threads, shapes=engine.shapes, plan=engine.plan,
            timer=versions.timer(trt, self._report),
        )  # fmt: skip
        self._record, self._manifest = engine.plan.record, engine.manifest
        self._context: Any = None
        self._eligible, self._chosen = set[str](), set[str]()

    def run(self, feeds: Mapping[str, Array]) -> None:
        """See Profiler."""
        self._runs.append({})
        self._engine.infer(feeds)
        self._context = self._engine.lane({name: array.shape for name, array in feeds.items()}).context

    def _report(self, layer: str, ms: float) -> None:
        self._runs[-1][layer] = self._runs[-1].get(layer, 0.0) + ms

    def finish(self, *, weights: Iterable[str]) -> tuple[LayerTime, ...]:
        """See Profiler."""
        counted = self._runs[min(WARMUP, len(self._runs) - 1) :] if self._runs else []
        if not any(counted):
            self._engine.close()
            raise EngineError("TensorRT gives no time of its layers here.")
        layers = self._layers()
        self._context = None
        self._engine.close()
        names = list(dict.fromkeys(name for run in counted for name in run))
        where = LayerMap(read_nodes(self._engine.artifact / MODEL_NAME), weights)
        known = {name: layers.get(plain_name(name), {}) for name in names}
        placed = where.weights_of(
            names,
            metadata={name: str(layer.get("Metadata", "")) for name, layer in known.items()},
            kinds={name: str(layer.get("LayerType", "")) for name, layer in known.items()},
        )
        eligible, chosen = versions.sparse_layers(self._record.get("sparsity", ()))
        self._eligible, self._chosen = where.weights_named(eligible), where.weights_named(chosen)
        return tuple(
            LayerTime(
                node=plain_name(name),
                operator=str(known[name].get("LayerType") or "layer"),
                time_ms=median(run.get(name, 0.0) for run in counted),
                weights=placed[name],
                kernel=_kernel(known[name]),
            )
            for name in names
        )

    def explain(self, weight: WeightInfo, *, pattern: str, place: LayerTime | None) -> Verdict:
        """See Profiler."""
        told = bool(self._record.get("sparsity"))
        return judge(
            weight, pattern=pattern, place=place, eligible=weight.initializer in self._eligible if told else None,
            chosen=weight.initializer in self._chosen, precision=self._manifest.precision,
            version=f"{_TITLES[self._trt.__name__]} {self._trt.__version__}",
            asked="sparse_weights" in self._record["flags"],
        )  # fmt: skip

    def _layers(self) -> dict[str, dict[str, Any]]:
        """What the plan tells of its layers, by name; of a plan without details, nothing but their names."""
        inspector = self._engine.inspector()
        if self._context is not None:
            inspector.execution_context = self._context
        try:
            told = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON), strict=False)
        except ValueError:  # names with characters that TensorRT does not escape
            return {}
        return {
            plain_name(layer["Name"]): layer
            for layer in told.get("Layers", ())
            if isinstance(layer, dict) and "Name" in layer
        }


_TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def _kernel(layer: Mapping[str, Any]) -> str:
    """The kernel's name, where HasSparseWeights says so with the word sparse added."""
    name = str(layer.get("TacticName") or "")
    return f"{name} (sparse)" if layer.get("HasSparseWeights") and not is_sparse_kernel(name) else name


def is_sparse_kernel(name: str) -> bool:
    """Sparse kernels have the word in their names: ...sparse_conv..., or cuSPARSELt's spgemm and spmma."""
    return any(word in name.lower() for word in ("sparse", "spgemm", "spmma"))


def judge(
    weight: WeightInfo, *, pattern: str, place: LayerTime | None, eligible: bool | None, chosen: bool, precision: str,
    version: str, asked: bool,
) -> Verdict:  # fmt: skip
    """What became of a weight's zeros.

    eligible and chosen: what the builder's log says, for some profile of the plan; the kernel of *place*, where it has
    a name, is that of the profile that ran, and goes before. asked: whether the plan was built for sparse kernels.
    """
    kernel = "" if place is None else place.kernel
    ran = is_sparse_kernel(kernel) or (chosen and not kernel)
    why, advice = _reasons(
        weight, pattern=pattern, eligible=eligible, kernel=kernel, ran=ran, precision=precision, version=version,
        asked=asked,
    )  # fmt: skip
    if place is not None and len(place.weights) > 1:
        why += f"; fused with {len(place.weights) - 1} others, so that its time cannot be told apart"
    if pattern not in versions.SPARSE_PATTERNS:
        eligible = False
    return Verdict(eligible=True if ran else eligible, chosen=ran, why=why, advice=advice)


def _reasons(
    weight: WeightInfo, *, pattern: str, eligible: bool | None, kernel: str, ran: bool, precision: str, version: str,
    asked: bool,
) -> tuple[str, str]:  # fmt: skip
    """Why no sparse kernel ran, the first cause first, and what to change."""
    rows, columns = weight.shape[0], weight.shape[1] if len(weight.shape) > 1 else 1
    size, form = f"{rows} x {columns}", weight.form or "the operator"
    if ran:
        return f"a sparse kernel ran{f': {kernel}' if is_sparse_kernel(kernel) else ''}", ""
    if pattern not in versions.SPARSE_PATTERNS:
        return (
            f"{version} has sparse kernels for 2:4 alone, and multiplies zeros of pattern {pattern} like any number",
            f"train with --pattern 2:4, or {REMOVE}",
        )
    if not asked:
        return f"the plan was built without sparse kernels, as {version} was asked to", "delete the folder plans"
    if eligible:
        why, advice = f"eligible, but {version} measured a dense kernel to be faster at this shape", ""
        if precision not in SPARSE_TYPES:
            why, advice = f"{why}, in {precision}", "export with --precision fp16; or "
        if min(rows, columns) < SMALL:
            why += f"; {size} is small"
        return why, f"{advice}larger batches or a wider model; where neither is wanted, {REMOVE}"
    if precision not in SPARSE_TYPES:
        return (
            f"the graph is {precision}, and {version}'s sparse kernels are for fp16 and int8",
            "export with --precision fp16",
        )
    if eligible is None:
        return f"{version} does not say which layers are eligible, and no sparse kernel is seen", REMOVE
    if form != "Conv":
        return (
            f"{version} counts no {form} of this kind as eligible for sparse kernels, which take convolutions",
            "export with --linear-form conv and compare the whole model's time, since fusions are lost with it; "
            f"or {REMOVE}",
        )
    return f"{version} does not count this convolution of {size} as eligible, and does not say why", REMOVE
