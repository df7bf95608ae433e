"""The time of each node of ONNX Runtime on a GPU, and which weights it computes with.

ONNX Runtime's profiler tells how long the host was busy with a node. On a GPU the node's kernels run on after that,
unless every launch is waited for, as CUDA does where CUDA_LAUNCH_BLOCKING is set before its first use. So a process of
its own runs what the engine runs, the fused graph, with that variable, with the profiler on and without CUDA graphs.
Launching and waiting add some microseconds to every kernel: all nodes together take longer than an inference, and small
ones seem longer than they are.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import EngineError
from serve.engines import Array, LayerTime
from serve.engines._onnxruntime_profile import OnnxRuntimeProfiler
from serve.engines._onnxruntime_providers import Providers, session_options

WAITING = {"CUDA_LAUNCH_BLOCKING": "1"}
RUNS = 8
"""Inferences of the process, of which those that OnnxRuntimeProfiler leaves out do not count."""

GraphFile = Callable[[Mapping[str, Array]], tuple[Path, Mapping[str, str]]]
"""FusedSessions.graph_file of the engine (serve.engines._onnxruntime_cuda)."""


class CudaProfiler:
    """See serve.engines.Profiler. The process starts with finish, which is when all of the GPU's memory is needed."""

    explain = staticmethod(OnnxRuntimeProfiler.explain)

    def __init__(self, file: Path, graph_file: GraphFile, *, providers: Providers, threads: int) -> None:
        """For the model *file*, where *providers* (serve.engines._onnxruntime_providers) run *graph_file* of it."""
        self._file, self._graph_file, self._providers, self._threads = file, graph_file, providers, threads
        self._feeds: dict[str, Array] = {}

    def run(self, feeds: Mapping[str, Array]) -> None:
        """Remember what is to be run."""
        self._feeds = dict(feeds)

    def finish(self, *, weights: Iterable[str]) -> tuple[LayerTime, ...]:
        """See Profiler. Raises EngineError where the process fails."""
        with tempfile.TemporaryDirectory() as name:
            feeds = Path(name) / "feeds.npz"
            np.savez(feeds, **self._feeds)  # type: ignore[arg-type]
            model, merged = self._graph_file(self._feeds)
            settings = {
                "model": str(model), "original": str(self._file), "feeds": str(feeds), "merged": dict(merged),
                "weights": list(weights), "providers": self._providers, "threads": self._threads,
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", __name__], input=json.dumps(settings), env=os.environ | WAITING,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise EngineError(f"The process that profiles {self._file} failed: {last}")
        return tuple(LayerTime(**{**each, "weights": tuple(each["weights"])}) for each in json.loads(done.stdout))


def main() -> None:
    """Profile what stdin says, in JSON, and print the LayerTimes."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    settings: dict[str, Any] = json.load(sys.stdin)
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    providers = [tuple(each) if isinstance(each, list) else each for each in settings["providers"]]
    profiler = OnnxRuntimeProfiler(
        onnxruntime, Path(settings["model"]), options=session_options(onnxruntime, settings["threads"]),
        providers=providers, original=Path(settings["original"]), merged=settings["merged"],
    )  # fmt: skip
    wanted = providers[0][0] if isinstance(providers[0], tuple) else providers[0]
    if profiler.provider != wanted:  # ONNX Runtime goes on with the next one
        sys.exit(f"{wanted} does not start there.")
    with np.load(settings["feeds"]) as feeds:
        arrays = dict(feeds)
    for _ in range(RUNS):
        profiler.run(arrays)
    print(json.dumps([asdict(each) for each in profiler.finish(weights=settings["weights"])]), file=answers)


if __name__ == "__main__":
    main()
