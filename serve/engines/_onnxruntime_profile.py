"""Which node of ONNX Runtime's optimized graph computes which weight, and in what time.

A second session of the same model runs with the profiler on and writes down the graph that it made. A weight is looked
for in that graph by its name; where an optimizer renamed it (packed for another layout, quantized), by the name of the
node that used it in the file.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from export.manifest import WeightInfo
from pst.errors import EngineError
from serve.engines import Array, LayerTime, Verdict
from serve.engines._onnx_nodes import Node, computing_nodes, read_nodes
from serve.engines._sparse_layout import ENOUGH

MULTIPLIED = "ONNX Runtime has no sparse kernel for {operator}: it multiplies zeros like any other number"
UNSEEN = "the runtime's optimizer merged it into another tensor, so that its time cannot be told apart"
ADVICE = {
    "2:4": "on a processor --engine onnxruntime-sparse; on a GPU 2:4 kernels (TensorRT with a 1x1 convolution, "
    "cuSPARSELt), at sizes where they pay",
    None: f"on a processor --engine onnxruntime-sparse, {ENOUGH}; or remove whole heads and neurons "
    "(--pattern structured), which is faster on every runtime",
}
"""What to change, by pattern; None is for every other one."""
WARMUP = 2
"""Inferences that do not count: the first ones allocate."""
_SUFFIX = "_kernel_time"


class OnnxRuntimeProfiler:
    """See serve.engines.Profiler."""

    def __init__(
        self, runtime: Any, file: Path, *, options: Any, providers: Sequence[Any], original: Path | None = None,
        merged: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Open *file* once more, with *options* (SessionOptions) and the profiler on.

        original: the artifact's file, where *file* is another graph of it. merged: weights that lie beside others
        there, by name, and the initializer that holds them.
        Raises EngineError where onnx is not installed, or the runtime refuses.
        """
        self._onnx, self._file, self._runs = _onnx(), original or file, 0
        self._merged = merged or {}
        self._folder = tempfile.TemporaryDirectory()
        self._optimized = Path(self._folder.name) / "optimized.onnx"
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        options.optimized_model_filepath = str(self._optimized)
        try:
            self._session = runtime.InferenceSession(str(file), options, providers=list(providers))
        except Exception as error:  # the runtime's exceptions have no common base but this
            self._folder.cleanup()
            raise EngineError(f"ONNX Runtime cannot profile {file}: {str(error).strip().splitlines()[0]}.") from error

    @property
    def provider(self) -> str:
        """Where the session runs what it can."""
        return str(self._session.get_providers()[0])

    def run(self, feeds: Mapping[str, Array]) -> None:
        """See Profiler."""
        self._session.run(None, dict(feeds))
        self._runs += 1

    def finish(self, *, weights: Iterable[str]) -> tuple[LayerTime, ...]:
        """See Profiler."""
        with self._folder:
            events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
            graph = self._onnx.load(str(self._optimized), load_external_data=False).graph
        times: dict[str, list[float]] = defaultdict(list)
        operators = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
                node = event["name"].removesuffix(_SUFFIX)
                times[node].append(event["dur"] / 1000)
                operators[node] = event["args"]["op_name"]
        where = _places(graph, read_nodes(self._file), tuple(weights), self._merged)
        return tuple(
            LayerTime(
                node=node, operator=operators[node], time_ms=self._per_run(found), weights=tuple(where.get(node, ()))
            )
            for node, found in times.items()
        )

    @staticmethod
    def explain(weight: WeightInfo, *, pattern: str, place: LayerTime | None) -> Verdict:
        """See Profiler."""
        why = UNSEEN if place is None else MULTIPLIED.format(operator=place.operator)
        return Verdict(eligible=False, chosen=False, why=why, advice=ADVICE.get(pattern, ADVICE[None]))

    def _per_run(self, found: list[float]) -> float:
        """The median inference's; a node that runs several times in one, in a loop, counts with all of them."""
        each = max(1, len(found) // self._runs)
        sums = [sum(found[start : start + each]) for start in range(0, len(found), each)]
        return median(sums[min(WARMUP, len(sums) - 1) :])


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise EngineError("onnx is needed to tell layers apart; install it with: pip install onnx.") from error
    return onnx


def _places(
    optimized: Any, original: Sequence[Node], weights: Sequence[str], merged: Mapping[str, str]
) -> dict[str, list[str]]:
    """The weights that each node of *optimized* computes with.

    A convolution of blocked layout is called after its output.
    """
    computing = computing_nodes(original, weights)
    inside = {node.name: set(node.input) for node in optimized.node}
    found: dict[str, list[str]] = defaultdict(list)
    for weight in weights:
        held = merged.get(weight, weight)
        nodes = [node for node, inputs in inside.items() if held in inputs]
        if not nodes:
            places = [original[place] for place in computing[weight]]
            names = [name for node in places for name in (node.name, *(f"{output}_nchwc" for output in node.outputs))]
            nodes = [name for name in names if name in inside]
        for node in nodes:
            found[node].append(weight)
    return found
