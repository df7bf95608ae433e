"""Which node runs which weight of the graph that ONNX Runtime is given for a GPU; here with its kernels for the CPU."""

from pathlib import Path

import pytest

from export import manifest
from pst.errors import EngineError
from serve.bench.receipt import receipts
from serve.bench.workload import Workload, random_workload
from serve.engines import Profiler, open_engine
from serve.engines._onnxruntime_cuda_profile import CudaProfiler
from serve.engines.onnxruntime import OnnxRuntimeEngine

CPU = ["CPUExecutionProvider"]


@pytest.fixture
def workload() -> Workload:
    return random_workload((2, 8), vocab_size=20)


def test_every_weight_is_found_in_the_fused_graph(sparse_artifact: Path, workload: Workload) -> None:
    with open_engine(sparse_artifact, threads=1) as engine:
        feeds = workload.feeds_of(0, engine.inputs)
    listed = [weight.initializer for weight in manifest.load(sparse_artifact, verify=False).weights]
    profiler = CudaProfiler(sparse_artifact / "model.onnx", providers=CPU, threads=1)
    profiler.run(feeds)
    times = profiler.finish(weights=listed)
    assert sorted(weight for each in times for weight in each.weights) == sorted(listed)
    attention = [each for each in times if each.operator == "Attention"]
    assert len(attention) == 2  # a tiny BERT of two layers
    for each in attention:
        assert [weight.rsplit(".", 2)[-2] for weight in each.weights] == ["query", "key", "value"]
        assert each.time_ms > 0


def test_the_receipt_of_a_fused_graph(
    sparse_artifact: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profiler(engine: OnnxRuntimeEngine) -> Profiler:
        return CudaProfiler(sparse_artifact / "model.onnx", providers=CPU, threads=1)

    monkeypatch.setattr(OnnxRuntimeEngine, "profiler", profiler)
    with open_engine(sparse_artifact, threads=1) as engine:
        (found,) = receipts({"a": engine}, {"a": manifest.load(sparse_artifact, verify=False)}, [workload])
    merged = [layer for layer in found.layers if layer.operator == "Attention"]
    assert {layer.fused for layer in merged} == {2}
    assert {layer.time_ms for layer in merged} == {None}
    assert merged[0].why == "ONNX Runtime has no sparse kernel for Attention: it multiplies zeros like any other number"
    assert all(layer.time_ms for layer in found.layers if layer not in merged)


def test_a_process_that_fails_says_why(sparse_artifact: Path, workload: Workload) -> None:
    with open_engine(sparse_artifact, threads=1) as engine:
        feeds = workload.feeds_of(0, engine.inputs)
    profiler = CudaProfiler(sparse_artifact / "model.onnx", providers=["NoProvider"], threads=1)
    profiler.run(feeds)
    with pytest.raises(EngineError, match=r"The process that profiles .*model.onnx failed: .*NoProvider"):
        profiler.finish(weights=[])
