"""One way of timing an artifact, in a process of its own; benchmarks/trusted_tools.py starts it.

    python -m benchmarks.trusted_tools_worker perf_test '{"artifact": ..., "model": ..., "shape": [1, 128], ...}'

It writes a JSON line once it is ready, then one for each number of inferences that it reads: their milliseconds, after
one that is not timed. It answers when its threads have come to rest: ONNX Runtime's spin for tens of milliseconds after
an inference, unless they are told not to, and would slow down whoever is timed next. All ways get the same tokens,
without padding.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.manifest import Manifest
from serve.bench.stopping import StopRule
from serve.bench.timing import measure_in_turn
from serve.bench.workload import random_workload
from serve.describe import vocab_size
from serve.engines import Array, Shapes, TensorSpec, open_engine

WARMUP = 10
"""Inferences before the first that counts, as of pst bench; CUDA graphs are recorded by then."""

LOOK_S, IDLE_SHARE, MOST_S = 0.01, 0.05, 2.0
"""At rest is who used no more than this share of a CPU since the last look; and the most to wait for that."""

Times = Callable[[int], list[float]]
"""Milliseconds of so many inferences, after one that is not timed."""
Way = Callable[[Mapping[str, Any]], tuple[dict[str, Any], Times]]
"""Settings to what is to be known of it, and the times."""


def main() -> None:
    """Answer on what was stdout; what libraries print there goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    settings: dict[str, Any] = json.loads(sys.argv[2])
    told, times = WAYS[sys.argv[1]](settings)
    times(WARMUP)
    rest()
    print(json.dumps(told), file=answers, flush=True)
    for line in sys.stdin:
        found = times(int(line))
        rest()
        print(json.dumps(found), file=answers, flush=True)


def rest() -> None:
    """Wait until this process uses the CPU no more."""
    end = time.perf_counter() + MOST_S
    while time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(LOOK_S)
        if time.process_time() - used <= IDLE_SHARE * (time.perf_counter() - start):
            break


def ours(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Times]:
    """An engine as ``pst bench`` opens and times it. Tells the plan that TensorRT runs."""
    shape = _shape(settings)
    engine = open_engine(
        Path(settings["artifact"]), engine=settings["engine"], threads=settings["threads"],
        shapes=Shapes(fixed=(shape,), others=False),
    )  # fmt: skip
    feeds = feeds_of(Path(settings["artifact"]), shape)
    told: dict[str, Any] = {"engine": engine.name}
    if hasattr(engine, "plan"):
        profiles = [profile.usual if profile.is_fixed else None for profile in engine.plan.profiles]
        told |= {
            "plan": str(engine.plan.path), "profile": profiles.index(shape), "types": engine.input_types(),  # type: ignore[attr-defined]
        }  # fmt: skip

    def times(count: int) -> list[float]:
        rule = StopRule(runs=count, precision=0, budget_s=math.inf)
        timing = measure_in_turn({"ours": lambda _: engine.infer(feeds)}, batch=shape[0], warmup=1, rule=rule)
        return list(timing.samples["ours"])

    return told, times


def perf_test(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Times]:
    """What onnxruntime_perf_test does: one session, one run to warm up, then the wall-clock time of each Session::Run.

    After onnxruntime/test/perftest (performance_runner.h, ort_test_session.cc) of github.com/microsoft/onnxruntime.
    *stop_spinning* is its option -Z, and *bound* its -g together with -i "enable_cuda_graph|1": inputs and outputs stay
    on the GPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.log_severity_level = 4
    if settings.get("stop_spinning"):
        options.add_session_config_entry("session.force_spinning_stop", "1")
    cuda, bound = settings["engine"].startswith("onnxruntime-cuda"), settings.get("bound", False)
    session = onnxruntime.InferenceSession(
        settings["model"], options, providers=_providers(settings["engine"], graphs=bound)
    )
    if cuda and session.get_providers()[0] != "CUDAExecutionProvider":
        raise SystemExit("ONNX Runtime's CUDA provider does not start here.")
    feeds = feeds_of(Path(settings["artifact"]), _shape(settings))
    names = [output.name for output in session.get_outputs()]
    if not bound:
        return {}, _timed(lambda: session.run(names, feeds))
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    manifest, (rows, tokens) = Manifest.load(Path(settings["artifact"]), verify=False), _shape(settings)
    for output in manifest.outputs:
        lengths = [{"batch_size": rows}.get(each, tokens) if isinstance(each, str) else each for each in output.shape]
        # A CUDA graph wants fixed addresses, of the outputs as well.
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(lengths, _numpy(output.dtype), "cuda", 0)
        binding.bind_ortvalue_output(output.name, value)
    return {}, _timed(lambda: session.run_with_iobinding(binding))


def polygraphy_onnxrt(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Times]:
    """``polygraphy run MODEL --onnxrt``: its runner, with a session as it makes it, and the time that it tells.

    It takes as many threads as the process has CPUs, hence one that has no more than *threads* while it opens.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx

    session = SessionFromOnnx(settings["model"], providers=_providers(settings["engine"]))
    runner = OnnxrtRunner(session)
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(usable)[: settings["threads"]])
    runner.activate()
    os.sched_setaffinity(0, usable)
    return {}, _asked(runner, feeds_of(Path(settings["artifact"]), _shape(settings)))


def polygraphy_trt(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Times]:
    """``polygraphy run PLAN --trt``: copies to the GPU, the plan without a CUDA graph, and copies back."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    runner = TrtRunner(EngineFromBytes(BytesFromPath(settings["plan"])), optimization_profile=settings["profile"])
    feeds = feeds_of(Path(settings["artifact"]), _shape(settings))
    runner.activate()
    return {}, _asked(runner, {name: array.astype(settings["types"][name]) for name, array in feeds.items()})


WAYS: Mapping[str, Way] = {
    "ours": ours,
    "perf_test": perf_test,
    "polygraphy_onnxrt": polygraphy_onnxrt,
    "polygraphy_trt": polygraphy_trt,
}


def feeds_of(artifact: Path, shape: tuple[int, int]) -> dict[str, Array]:
    """The tokens that pst bench gives to *artifact* at *shape*, by input."""
    inputs = {
        tensor.name: TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for tensor in Manifest.load(artifact, verify=False).inputs
    }
    return random_workload(shape, vocab_size=vocab_size(artifact)).feeds_of(0, inputs)


def _shape(settings: Mapping[str, Any]) -> tuple[int, int]:
    batch, tokens = settings["shape"]
    return batch, tokens


def _numpy(name: str) -> Any:
    import numpy as np

    return np.dtype(name).type


def _providers(engine: str, *, graphs: bool = False) -> list[Any]:
    """Those of our own engine, so that the same kernels run."""
    from serve.engines._onnxruntime_providers import CPU, CUDA, cuda_options, with_graphs

    if not engine.startswith("onnxruntime-cuda"):
        return [CPU]
    providers: list[Any] = [(CUDA, cuda_options(tf32=engine.endswith("tf32"))), CPU]
    return with_graphs(providers) if graphs else providers


def _timed(run: Callable[[], object]) -> Times:
    def times(count: int) -> list[float]:
        run()
        found = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            found.append((time.perf_counter() - start) * 1000)
        return found

    return times


def _asked(runner: Any, feeds: Mapping[str, Array]) -> Times:
    """A polygraphy.backend.base.BaseRunner that is active, asked as polygraphy.comparator.Comparator.run does."""

    def times(count: int) -> list[float]:
        runner.infer(feeds)
        found = []
        for _ in range(count):
            runner.infer(feeds)
            found.append(runner.last_inference_time() * 1000)
        return found

    return times


if __name__ == "__main__":
    main()
