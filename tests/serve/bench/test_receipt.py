"""Receipts: of real sessions, of graphs that an optimizer changes, and of what cannot be told."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import manifest
from export.manifest import WeightInfo
from pst.errors import EngineError
from serve.bench.receipt import Layer, Other, Receipt, _layers, groups, receipts
from serve.bench.receipt_text import layer_table, receipt_table, summary
from serve.bench.workload import random_workload
from serve.engines import Array, LayerTime, Verdict, open_engine
from serve.engines._onnxruntime_profile import OnnxRuntimeProfiler
from serve.engines.onnxruntime import OnnxRuntimeEngine

WORKLOAD = random_workload((2, 8), vocab_size=20)


@pytest.fixture(scope="module")
def found(bert_artifact: Path, sparse_artifact: Path) -> tuple[Receipt, ...]:
    paths = {"dense": bert_artifact, "sparse": sparse_artifact}
    engines = {name: open_engine(path, engine="onnxruntime", threads=1) for name, path in paths.items()}
    made = receipts(engines, {name: manifest.load(path, verify=False) for name, path in paths.items()}, [WORKLOAD])
    for engine in engines.values():
        engine.close()
    return made


def test_every_weight_of_the_manifest_has_its_kernel(found: tuple[Receipt, ...], sparse_artifact: Path) -> None:
    dense, sparse = found
    assert (dense.artifact, sparse.artifact, sparse.workload) == ("dense", "sparse", "2x8")
    listed = manifest.load(sparse_artifact, verify=False).weights
    assert [layer.weight for layer in sparse.layers] == [weight.name for weight in listed]
    for layer, weight in zip(sparse.layers, listed, strict=True):
        assert layer.operator in ("MatMul", "Gemm", "FusedGemm")
        assert layer.time_ms is not None
        assert layer.time_ms > 0
        assert layer.density == weight.density
        assert layer.pattern == "2:4"
        assert not layer.sparse_kernel
        assert (
            layer.why
            == f"ONNX Runtime has no sparse kernel for {layer.operator}: it multiplies zeros like any other number"
        )
        assert "cuSPARSELt" in layer.advice
    assert 0 < sparse.layers_ms < sparse.total_ms
    assert sparse.limit == pytest.approx(sparse.total_ms / (sparse.total_ms - sparse.layers_ms))


def test_the_baseline_stands_beside(found: tuple[Receipt, ...]) -> None:
    dense, sparse = found
    times = {layer.weight: layer.time_ms for layer in dense.layers}
    assert all(layer.baseline_ms == times[layer.weight] for layer in sparse.layers)
    assert {layer.why for layer in dense.layers} == {"there are no zeros to speak of"}
    assert {layer.baseline_ms for layer in dense.layers} == {None}
    assert {layer.advice for layer in dense.layers} == {""}


def test_what_computes_with_no_weight_is_told_too(found: tuple[Receipt, ...]) -> None:
    dense, sparse = found
    for receipt in found:
        assert receipt.layers_ms + receipt.others_ms == pytest.approx(receipt.total_ms)
        times = [other.time_ms for other in receipt.others]
        assert times == sorted(times, reverse=True)
        counts = {other.operator: other.count for other in receipt.others}
        assert counts["Softmax"] == 2  # a tiny BERT of two layers
    assert (dense.baseline_total_ms, sparse.baseline_total_ms) == (None, dense.total_ms)
    longest = sparse.others[0]
    assert f"{longest.count} x {longest.operator} {longest.time_ms:.2f}" in summary(sparse)
    assert "Sparse kernels ran" not in summary(sparse)


@pytest.mark.parametrize(("baseline", "lost"), [(0.61, True), (1.2, False), (None, False)])
def test_sparse_kernels_that_cannot_make_up_for_lost_fusions(baseline: float | None, lost: bool) -> None:
    one: dict[str, Any] = {"shape": (64, 64), "pattern": "2:4", "operator": "CaskConvolution", "baseline_ms": None}
    one |= {"why": "", "advice": ""}
    layers = (
        Layer(weight="a", density=0.5, time_ms=0.5, sparse_kernel=True, **one),
        Layer(weight="b", density=0.5, time_ms=0.1, sparse_kernel=False, **one),
        Layer(weight="c", density=1.0, time_ms=0.0, sparse_kernel=False, **one),
    )
    others = (
        Other(operator="Softmax", count=12, time_ms=0.7),
        Other(operator="Reformat", count=48, time_ms=0.3),
        Other(operator="Slice", count=1, time_ms=0.01),
    )
    receipt = Receipt(
        artifact="a", workload="1x8", total_ms=1.61, layers=layers, others=others, baseline_total_ms=baseline
    )
    said = summary(receipt)
    assert "1.01 ms go to what computes with none of them: 12 x Softmax 0.70, 48 x Reformat 0.30." in said
    assert "Sparse kernels ran in 1 of 2 layers with zeros." in said
    assert ("takes longer than all of the baseline (0.61 ms)" in said) == lost
    assert Receipt.from_json(json.loads(json.dumps(receipt.to_json()))) == receipt


@pytest.mark.parametrize(("factor", "slowed"), [(5.2, True), (1.21, True), (1.19, False), (0.4, False), (None, False)])
def test_a_profile_that_is_much_longer_than_an_inference(
    found: tuple[Receipt, ...], factor: float | None, slowed: bool
) -> None:
    receipt = found[1]
    latency = None if factor is None else receipt.total_ms / factor
    said = summary(receipt, inference_ms=latency)
    words = "" if latency is None else f"took {receipt.total_ms:.2f} ms where an inference takes {latency:.2f}: "
    assert (f"The profile {words}what the profiler adds, such as launches and waits, is in" in said) == slowed
    assert ("if they took no time" in said) != slowed
    assert (receipt.to_json(inference_ms=latency)["limit"] is None) == slowed
    assert f"These layers take {receipt.layers_ms:.2f} of {receipt.total_ms:.2f} ms" in said


def test_fused_layers_of_a_slowed_profile(bert_artifact: Path) -> None:
    """Launches of many small kernels do not prove that fusions are lost."""
    made = replace(manifest.load(bert_artifact, verify=False), info("a", density=0.5), info("q"), info("k"))
    place = LayerTime(node="s", operator="Softmax", time_ms=3.0, weights=())
    times = [ran("a"), ran("q", "k"), place]
    layers = _layers(made, times, {}, lambda *_, **__: Verdict(eligible=True, chosen=True, why="", advice=""))
    others = (Other(operator="Softmax", count=1, time_ms=3.0),)
    receipt = Receipt(artifact="a", workload="1x8", total_ms=5.0, layers=layers, others=others, baseline_total_ms=2.0)
    assert receipt.limit is None
    for latency, slowed in ((1.0, True), (4.9, False)):
        said = summary(receipt, inference_ms=latency)
        assert ("The profile took 5.00 ms where an inference takes 1.00:" in said) == slowed
        assert ("fusions that the baseline has are lost" in said) != slowed
        assert "what they are fused into takes 1.00 of 5.00 ms." in said


def test_layers_of_a_kind_are_one_row(found: tuple[Receipt, ...]) -> None:
    kinds = groups(found[1])
    assert [len(kind.layers) for kind in kinds] == [2] * 6  # a tiny BERT of two layers
    header, rows = receipt_table(found[1])
    assert rows[0][0] == "2 x attention.self.query.weight"
    share = sum(float(row[header.index("share")].rstrip("%")) for row in rows) / 100
    assert share == pytest.approx(found[1].layers_ms / found[1].total_ms, abs=0.01)
    text = summary(found[1])
    assert "ONNX Runtime has no sparse kernel" in text
    assert "What would use these zeros: on a processor --engine onnxruntime-sparse; on a GPU 2:4 kernels" in text


def test_receipts_are_read_back(found: tuple[Receipt, ...]) -> None:
    for receipt in found:
        content = json.loads(json.dumps(receipt.to_json()))
        assert Receipt.from_json(content) == receipt
        for layer in content["layers"]:
            for name in ("eligible", "kernel", "node", "fused", "fused_ms"):  # an earlier version wrote none of them
                del layer[name]
            layer["of_a_later_version"] = 1
        old = Receipt.from_json(content)
        assert old.limit == receipt.limit
        assert [layer.weight for layer in old.layers] == [layer.weight for layer in receipt.layers]
        header, rows = layer_table(old)
        assert {row[header.index("sparse kernel")] for row in rows} == {"none" if receipt is found[1] else ""}


def save(path: Path, nodes: list[Any], weights: Mapping[str, Array]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("form", ["plain", "transposed", "dequantized"])
def test_a_weight_is_found_behind_what_only_changes_its_form(form: str, tmp_path: Path) -> None:
    """ONNX Runtime folds the transposed one, and keeps neither its name nor its shape."""
    W: Array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weights: dict[str, Array] = {"W": W}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["y"], name="r"),
    ]
    if form == "plain":
        nodes[0].input[1] = "W"
    elif form == "transposed":
        nodes.insert(0, helper.make_node("Transpose", ["W"], ["w"], name="t", perm=[1, 0]))
    else:
        weights = {"W": np.round(10 * W).astype(np.int8), "s": np.array(0.1, np.float32)}
        nodes.insert(0, helper.make_node("DequantizeLinear", ["W", "s"], ["w"], name="d"))
    with OnnxRuntimeEngine(save(tmp_path / "m.onnx", nodes, weights), variant="cpu", threads=1) as engine:
        profiler = engine.profiler()
        for _ in range(4):
            profiler.run({"x": np.ones((2, 4, 64), np.float32)})
        times = profiler.finish(weights=["W", "unused"])
    placed = [each for each in times if each.weights]
    assert [each.weights for each in placed] == [("W",)]
    assert "MatMul" in placed[0].operator
    assert placed[0].time_ms > 0


def test_a_convolution_in_blocked_layout_is_found(tmp_path: Path) -> None:
    """ONNX Runtime reorders its weight and renames the node."""
    W: Array = np.random.default_rng(0).standard_normal((64, 64, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Unsqueeze", ["x", "axis"], ["image"], name="u"),  # (2, 4, 64, 1)
        helper.make_node("Transpose", ["image"], ["channels"], name="t", perm=[0, 2, 1, 3]),
        helper.make_node("Conv", ["channels", "W"], ["y"], name="product"),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"W": W, "axis": np.array([3], np.int64)})
    with OnnxRuntimeEngine(path, variant="cpu", threads=1) as engine:
        profiler = engine.profiler()
        profiler.run({"x": np.ones((2, 4, 64), np.float32)})
        placed = [each for each in profiler.finish(weights=["W"]) if each.weights]
    assert [(each.operator, each.weights) for each in placed] == [("Conv", ("W",))]


def info(name: str, *, shape: tuple[int, int] = (8, 8), density: float = 1.0) -> WeightInfo:
    return WeightInfo(name=name, initializer=name, shape=shape, axis=0, density=density)


def ran(*weights: str, time: float = 1.0) -> LayerTime:
    return LayerTime(node="n", operator="MatMul", time_ms=time, weights=weights)


def explain(weight: WeightInfo, *, pattern: str, place: LayerTime | None) -> Verdict:
    return Verdict(eligible=None, chosen=False, why=f"{weight.name} is {pattern}", advice="none")


def test_what_was_removed_is_not_called_dense(bert_artifact: Path) -> None:
    made = manifest.load(bert_artifact, verify=False)
    before = _layers(replace(made, info("a"), info("b")), [ran("a"), ran("b")], {}, explain)
    after = _layers(
        replace(made, info("a", shape=(8, 4)), info("b")), [ran("a", time=0.5), ran("b")], by_name(before), explain
    )
    assert after[0].why == "8 x 4 is left of 8 x 8: removed, not zero, so that every runtime saves it"
    assert (after[0].baseline_ms, after[0].time_ms) == (1.0, 0.5)
    assert after[1].why == "there are no zeros to speak of"


def test_what_is_merged_has_no_time_of_its_own(bert_artifact: Path) -> None:
    made = manifest.load(bert_artifact, verify=False)
    layers = _layers(
        replace(made, info("q", density=0.5), info("k", density=0.5), info("gone", density=0.5)),
        [ran("q", "k", time=3.0)], {}, explain,
    )  # fmt: skip
    assert [layer.time_ms for layer in layers] == [None, None, None]
    assert [layer.fused_ms for layer in layers] == [3.0, 3.0, None]
    assert [layer.operator for layer in layers] == ["MatMul", "MatMul", None]
    assert [layer.why for layer in layers] == ["q is unstructured", "k is unstructured", "gone is unstructured"]
    receipt = Receipt(artifact="a", workload="1x8", total_ms=4.0, layers=layers)
    assert receipt.limit is None
    assert "2 of these layers are fused with others; what they are fused into takes 3.00 of 4.00 ms." in summary(
        receipt
    )
    verdict = OnnxRuntimeProfiler.explain(info("gone", density=0.5), pattern="unstructured", place=None)
    assert "cannot be told apart" in verdict.why
    assert "structured" in verdict.advice


def test_what_became_of_the_zeros_is_counted() -> None:
    def told(*verdicts: tuple[bool | None, bool]) -> str:
        layers = [
            Layer(
                weight=f"w.{place}", shape=(8, 8), pattern="2:4", density=0.5, operator="Conv", time_ms=1.0,
                baseline_ms=None, sparse_kernel=chosen, why="", advice="", eligible=eligible,
            )
            for place, (eligible, chosen) in enumerate(verdicts)
        ]  # fmt: skip
        (group,) = groups(Receipt(artifact="a", workload="1x8", total_ms=9.0, layers=tuple(layers)))
        return group.sparse_kernel

    assert told((True, True), (True, False), (False, False)) == "chosen 1 of 3"
    assert told((True, False), (False, False)) == "eligible, not chosen"
    assert told((None, False)) == "not told"
    assert told((False, False)) == "none"


def by_name(layers: Iterable[Any]) -> dict[str, Any]:
    return {layer.weight: layer for layer in layers}


def replace(made: manifest.Manifest, *weights: WeightInfo) -> manifest.Manifest:
    import dataclasses

    return dataclasses.replace(made, weights=weights, pattern="unstructured")


def test_an_engine_that_does_not_tell_gets_none(
    bert_artifact: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"a": manifest.load(bert_artifact, verify=False)}
    with open_engine(tiny_bert, engine="torch-cpu", threads=1) as engine:
        assert receipts({"a": engine}, made, [WORKLOAD]) == ()

    def refuse(self: Any) -> Any:
        raise EngineError("It does not.")

    monkeypatch.setattr(OnnxRuntimeEngine, "profiler", refuse)
    with open_engine(bert_artifact, threads=1) as engine:
        assert receipts({"a": engine}, made, [WORKLOAD]) == ()
    assert "No receipt: It does not." in capsys.readouterr().err
