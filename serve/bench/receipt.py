"""The receipt: where the sparsity of each layer went. Which kernel ran, in what time, and why zeros saved none.

Weights are those that an artifact's export.json lists, under the names of their PyTorch parameters, so that the rows of
a dense and of a sparse artifact stand side by side.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from export.manifest import Manifest, WeightInfo
from pst.errors import EngineError
from pst.progress import note, progress
from serve.bench.workload import Workload
from serve.engines import Engine, LayerTime, ProfilingEngine, Verdict

Explain = Callable[..., Verdict]
"""Profiler.explain of an engine: every runtime says itself what became of a weight's zeros."""

RUNS = 12
"""Profiled inferences of each artifact; each layer's median counts."""
SPARSE_BELOW = 0.95
"""Density from which on down a weight counts as sparse."""
DENSE = "there are no zeros to speak of"
SLOWED_FROM = 1.2
"""All layers of the profile over an inference, from which on what the profiler adds spoils what follows from them."""
REMOVED = "{now} is left of {before}: removed, not zero, so that every runtime saves it"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight as it ran."""

    weight: str
    """Name of the PyTorch parameter."""
    shape: tuple[int, ...]
    """As the file stores it."""
    pattern: str
    density: float
    """Fraction of non-zeros."""
    operator: str | None
    """What the runtime ran; None where no node can be told to be this weight's."""
    time_ms: float | None
    baseline_ms: float | None
    """The same weight's time in the baseline, where that has it."""
    sparse_kernel: bool
    """Whether one ran."""
    why: str
    """Why there is no sparse kernel, or which one ran."""
    advice: str
    eligible: bool | None = False
    """Whether the runtime has a sparse kernel for it; None where it does not say."""
    kernel: str = ""
    """The GPU's, where the runtime names it."""
    node: str = ""
    """The runtime's name of the layer that it made."""
    fused: int = 0
    """Other weights that one layer of the runtime computes with together with this one."""
    fused_ms: float | None = None
    """The time of all of that layer."""

    @property
    def is_sparse(self) -> bool:
        """Whether it has zeros that a kernel could have used."""
        return self.density < SPARSE_BELOW


@dataclass(frozen=True, kw_only=True)
class Other:
    """What the runtime ran besides: layers of one kind that compute with none of these weights."""

    operator: str
    count: int
    time_ms: float
    """Of all of them."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """All weights of one artifact on one workload."""

    artifact: str
    workload: str
    total_ms: float
    """All nodes together, with the profiler on; see is_slowed."""
    layers: tuple[Layer, ...]
    others: tuple[Other, ...] = ()
    """The longest first."""
    baseline_total_ms: float | None = None
    """The same total of the baseline; None of the baseline itself."""

    @property
    def layers_ms(self) -> float:
        """The time of the layers that could be told apart."""
        return sum(layer.time_ms or 0.0 for layer in self.layers)

    @property
    def others_ms(self) -> float:
        """The time of what computes with none of these weights."""
        return sum(other.time_ms for other in self.others)

    @property
    def limit(self) -> float | None:
        """Total over what is left without these layers: no sparse kernel could make the model faster than that.

        None where some of them are fused with others, or none can be found, so that their time is not known. Means
        nothing where the profile is_slowed.
        """
        if any(layer.fused for layer in self.layers) or all(layer.time_ms is None for layer in self.layers):
            return None
        rest = self.total_ms - self.layers_ms
        return self.total_ms / rest if rest > 0 else float("inf")

    def is_slowed(self, inference_ms: float | None) -> bool:
        """Whether this took clearly longer than *inference_ms*, the median latency of the same without a profiler.

        What the profiler adds to each layer, most of all to the small ones, is then no small part of the times. None is
        a latency that is not known, which says nothing.
        """
        return inference_ms is not None and self.total_ms > SLOWED_FROM * inference_ms

    def to_json(self, *, inference_ms: float | None = None) -> dict[str, Any]:
        """As plain JSON values; *inference_ms*: see is_slowed."""
        limit = None if self.is_slowed(inference_ms) else self.limit
        return {**asdict(self), "layers_ms": self.layers_ms, "limit": limit}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Receipt":
        """The reverse of to_json; what earlier versions did not write has its default."""
        known = {field.name for field in fields(Layer)}
        layers = (
            {name: each for name, each in layer.items() if name in known} | {"shape": tuple(layer["shape"])}
            for layer in value["layers"]
        )
        return cls(
            artifact=value["artifact"],
            workload=value["workload"],
            total_ms=value["total_ms"],
            layers=tuple(Layer(**layer) for layer in layers),
            others=tuple(Other(**other) for other in value.get("others", ())),
            baseline_total_ms=value.get("baseline_total_ms"),
        )


def receipts(
    engines: Mapping[str, Engine], manifests: Mapping[str, Manifest], workloads: Sequence[Workload]
) -> tuple[Receipt, ...]:
    """A receipt for each artifact that has a manifest and whose engine tells times, on each inference of one shape.

    They run in turn, as for the latency. The first artifact is the baseline, whose times stand beside the others'. What
    cannot be had is said in a note.
    """
    told = {
        name: engine for name, engine in engines.items() if name in manifests and isinstance(engine, ProfilingEngine)
    }
    fixed = [each for each in workloads if each.sequence is not None and not each.new_tokens] if told else []
    found: list[Receipt] = []
    with progress("profile layers", len(fixed)) as advance:
        for workload in fixed:
            try:
                ran = _profile(told, manifests, workload)
            except EngineError as error:
                note(f"No receipt: {error}")
                return tuple(found)
            before: dict[str, Layer] = {}
            baseline: float | None = None
            for name, (times, explain) in ran.items():
                made = Receipt(
                    artifact=name,
                    workload=workload.name,
                    total_ms=sum(each.time_ms for each in times),
                    layers=_layers(manifests[name], times, before, explain),
                    others=_others(times),
                    baseline_total_ms=baseline,
                )
                if name == next(iter(engines)):
                    before, baseline = {layer.weight: layer for layer in made.layers}, made.total_ms
                found.append(made)
            advance(1, workload.name)
    return tuple(found)


def _profile(
    engines: Mapping[str, ProfilingEngine], manifests: Mapping[str, Manifest], workload: Workload
) -> dict[str, tuple[tuple[LayerTime, ...], Explain]]:
    profilers = {name: engine.profiler() for name, engine in engines.items()}
    for _ in range(RUNS):
        for name, profiler in profilers.items():
            profiler.run(workload.feeds_of(0, engines[name].inputs))
    return {
        name: (
            profiler.finish(weights=[weight.initializer for weight in manifests[name].weights]),
            profiler.explain,
        )
        for name, profiler in profilers.items()
    }


def _layers(
    manifest: Manifest, ran: Sequence[LayerTime], baseline: Mapping[str, Layer], explain: Explain
) -> tuple[Layer, ...]:
    places: dict[str, LayerTime] = {weight: each for each in ran for weight in each.weights}
    layers = []
    for weight in manifest.weights:
        place = places.get(weight.initializer)
        fused = 0 if place is None else len(place.weights) - 1
        sparse = weight.density < SPARSE_BELOW
        pattern = weight.pattern or manifest.pattern if sparse else "dense"
        before = baseline.get(weight.name)
        verdict = explain(weight, pattern=pattern, place=place) if sparse else _dense(weight, before)
        layers.append(
            Layer(
                weight=weight.name,
                shape=tuple(weight.shape),
                pattern=pattern,
                density=weight.density,
                operator=None if place is None else place.operator,
                time_ms=None if place is None or fused else place.time_ms,
                baseline_ms=None if before is None else before.time_ms,
                sparse_kernel=verdict.chosen,
                why=verdict.why,
                advice=verdict.advice,
                eligible=verdict.eligible,
                kernel="" if place is None else place.kernel,
                node="" if place is None else place.node,
                fused=fused,
                fused_ms=place.time_ms if place is not None and fused else None,
            )
        )
    return tuple(layers)


def _others(ran: Sequence[LayerTime]) -> tuple[Other, ...]:
    kinds: dict[str, list[float]] = {}
    for each in ran:
        if not each.weights:
            kinds.setdefault(each.operator, []).append(each.time_ms)
    found = [Other(operator=kind, count=len(times), time_ms=sum(times)) for kind, times in kinds.items()]
    return tuple(sorted(found, key=lambda other: -other.time_ms))


def _dense(weight: WeightInfo, before: Layer | None) -> Verdict:
    removed = before is not None and math.prod(weight.shape) < math.prod(before.shape)
    why = REMOVED.format(now=size(weight.shape), before=size(before.shape)) if before and removed else DENSE
    return Verdict(eligible=False, chosen=False, why=why)


def size(shape: tuple[int, ...]) -> str:
    """768 x 3072."""
    return " x ".join(map(str, shape))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers of one kind, such as the intermediate weight of every block."""

    name: str
    """The weights' name with * for numbers."""
    layers: tuple[Layer, ...]

    @property
    def time_ms(self) -> float | None:
        """Of all layers; None where one is unknown."""
        times = [layer.time_ms for layer in self.layers]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def baseline_ms(self) -> float | None:
        """The same of the baseline."""
        times = [layer.baseline_ms for layer in self.layers]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def sparse_kernel(self) -> str:
        """Of how many layers a sparse kernel ran, or could have; empty where there is nothing to gain."""
        sparse = [layer for layer in self.layers if layer.is_sparse]
        chosen = sum(layer.sparse_kernel for layer in sparse)
        if not sparse:
            return ""
        if chosen:
            return f"chosen {chosen} of {len(sparse)}"
        if any(layer.eligible for layer in sparse):
            return "eligible, not chosen"
        return "not told" if any(layer.eligible is None for layer in sparse) else "none"

    @property
    def density(self) -> float:
        """Mean over the layers."""
        return sum(layer.density for layer in self.layers) / len(self.layers)

    def distinct(self, field: str) -> str:
        """The values of a field of the layers, each once."""
        values = (getattr(layer, field) for layer in self.layers)
        return ", ".join(
            dict.fromkeys(size(value) if field == "shape" else str(value or "unknown") for value in values)
        )


def groups(receipt: Receipt) -> list[Group]:
    """The layers by kind, in the order of the graph."""
    found: dict[str, list[Layer]] = {}
    for layer in receipt.layers:
        found.setdefault(re.sub(r"\d+", "*", layer.weight), []).append(layer)
    return [Group(name=name, layers=tuple(layers)) for name, layers in found.items()]
