"""Which node runs which weight of the graph that ONNX Runtime is given for a GPU; here with its kernels for the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export import manifest
from pst.errors import EngineError
from serve.bench.receipt import receipts
from serve.bench.workload import Workload, random_workload
from serve.engines import Array, Engine, Profiler, open_engine
from serve.engines import _onnxruntime_cuda as module
from serve.engines._onnxruntime_cuda import FusedSessions
from serve.engines._onnxruntime_cuda_profile import CudaProfiler
from serve.engines.onnxruntime import OnnxRuntimeEngine

CPU = ["CPUExecutionProvider"]


def on_cpu(folder: Path, engine: Engine) -> FusedSessions:
    """The sessions that *engine*, of the artifact *folder*, would have on a GPU."""
    return FusedSessions(
        onnxruntime, folder / "model.onnx", lambda model, graphs: onnxruntime.InferenceSession(model, providers=CPU),
        device="cpu", inputs=engine.inputs, outputs=engine.outputs, max_length=engine.max_length,
    )  # fmt: skip


@pytest.fixture
def sessions(sparse_artifact: Path) -> Iterator[FusedSessions]:
    with open_engine(sparse_artifact, threads=1) as engine:
        made = on_cpu(sparse_artifact, engine)
        yield made
        made.close()


@pytest.fixture
def fusings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was fused, in turn."""
    made, fused = list[dict[str, Any]](), module.fused

    def count(file: Path, **options: Any) -> Any:
        made.append({name: options[name] for name in ("unpadded", "last")})
        return fused(file, **options)

    monkeypatch.setattr(module, "fused", count)
    return made


@pytest.fixture
def workload() -> Workload:
    return random_workload((2, 8), vocab_size=20)


@pytest.fixture
def feeds(sparse_artifact: Path, workload: Workload) -> dict[str, Array]:
    with open_engine(sparse_artifact, threads=1) as engine:
        return workload.feeds_of(0, engine.inputs)


def profiler_of(artifact: Path, sessions: FusedSessions, providers: list[str] = CPU) -> CudaProfiler:
    return CudaProfiler(artifact / "model.onnx", sessions.graph_file, providers=providers, threads=1)


def test_every_weight_is_found_in_the_fused_graph(
    sparse_artifact: Path, sessions: FusedSessions, feeds: dict[str, Array]
) -> None:
    listed = [weight.initializer for weight in manifest.load(sparse_artifact, verify=False).weights]
    profiler = profiler_of(sparse_artifact, sessions)
    profiler.run(feeds)
    times = profiler.finish(weights=listed)
    assert sorted(weight for each in times for weight in each.weights) == sorted(listed)
    attention = [each for each in times if each.operator == "Attention"]
    assert len(attention) == 2  # a tiny BERT of two layers
    for each in attention:
        assert [weight.rsplit(".", 2)[-2] for weight in each.weights] == ["query", "key", "value"]
        assert each.time_ms > 0


def test_the_receipt_of_a_fused_graph(
    sparse_artifact: Path, sessions: FusedSessions, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profiler(engine: OnnxRuntimeEngine) -> Profiler:
        return profiler_of(sparse_artifact, sessions)

    monkeypatch.setattr(OnnxRuntimeEngine, "profiler", profiler)
    with open_engine(sparse_artifact, threads=1) as engine:
        (found,) = receipts({"a": engine}, {"a": manifest.load(sparse_artifact, verify=False)}, [workload])
    merged = [layer for layer in found.layers if layer.operator == "Attention"]
    assert {layer.fused for layer in merged} == {2}
    assert {layer.time_ms for layer in merged} == {None}
    assert merged[0].why == "ONNX Runtime has no sparse kernel for Attention: it multiplies zeros like any other number"
    assert all(layer.time_ms for layer in found.layers if layer not in merged)


def test_a_process_that_fails_says_why(sparse_artifact: Path, sessions: FusedSessions, feeds: dict[str, Array]) -> None:
    profiler = profiler_of(sparse_artifact, sessions, ["NoProvider"])
    profiler.run(feeds)
    with pytest.raises(EngineError, match=r"The process that profiles .*model.onnx failed: .*NoProvider"):
        profiler.finish(weights=[])


def test_all_shapes_are_profiled_with_one_file_for_each_form(
    sparse_artifact: Path, feeds: dict[str, Array], fusings: list[dict[str, Any]]
) -> None:
    with open_engine(sparse_artifact, threads=1) as engine:
        sessions = on_cpu(sparse_artifact, engine)
    shorter = {name: array[:, :5] for name, array in feeds.items()}
    file, merged = sessions.graph_file(feeds)
    assert sessions.graph_file(shorter) == (file, merged)
    assert len(set(merged.values())) == 2  # an initializer for each layer's queries, keys and values
    padded = feeds | {"attention_mask": np.tril(np.ones_like(feeds["attention_mask"]), 6)}
    other, _ = sessions.graph_file(padded)
    assert sessions.graph_file(padded)[0] == other != file
    # Each once for the session, whose bytes are not kept, and once for the file.
    assert [each["unpadded"] for each in fusings] == [True, True, False, False]
    for path, given in ((file, shorter), (other, padded)):
        session = onnxruntime.InferenceSession(str(path), providers=CPU)
        np.testing.assert_array_equal(session.run(["logits"], given)[0], sessions.run(given)["logits"])
    sessions.close()
    assert not file.parent.exists()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_of_a_decoder_the_prompt_is_profiled(
    exported: Callable[[str], tuple[Path, Path]], kind: str, fusings: list[dict[str, Any]]
) -> None:
    """As it is timed, with the scores of the last token; Llama's attention still reads the mask of whole texts."""
    artifact = exported(kind)[1]
    with open_engine(artifact, threads=1) as engine:
        sessions = on_cpu(artifact, engine)
        feeds = random_workload((2, 8), vocab_size=20).feeds_of(0, engine.inputs)
    file, _ = sessions.graph_file(feeds)
    assert fusings[-1] == {"unpadded": kind == "gpt2", "last": True}
    session = onnxruntime.InferenceSession(str(file), providers=CPU)
    assert session.run(["logits"], feeds)[0].shape == (2, 1, 35)
    padded = feeds | {"attention_mask": np.triu(np.ones_like(feeds["attention_mask"]))}
    assert (sessions.graph_file(padded)[0] == file) == (kind == "llama")
    sessions.close()


def test_what_is_not_used_is_not_profiled(
    sparse_artifact: Path, feeds: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the fused graph computes something else, the file as it is runs."""
    monkeypatch.setattr(module, "_AGREED", set())
    monkeypatch.setattr(module, "AGREES", -1.0)
    with open_engine(sparse_artifact, threads=1) as engine:
        sessions = on_cpu(sparse_artifact, engine)
    assert sessions.graph_file(feeds) == (sparse_artifact / "model.onnx", {})
