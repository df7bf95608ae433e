"""The prediction: from synthetic times exactly, and for real on the tiny model."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from export.pipeline import export
from pst.errors import ArtifactError, ConfigError, PatternError
from serve.engines._sparse_library import COMPILERS
from serve.predict import run
from serve.predict.products import Call, Product, Weights
from serve.predict.result import Prediction
from serve.predict.run import predict

from ...command_line import done, pst
from ...decoders import make_decoder


class Timed:
    """A product that takes milliseconds for each token, and says so without waiting."""

    def __init__(self, kernel: str, per_token: float) -> None:
        self.kernel, self._per_token = kernel, per_token

    def at(self, tokens: int) -> Call:
        return lambda: self._per_token * tokens


class Simulated:
    """A runtime with a 2:4 kernel whose product takes *sparse* of the dense one's time, plus half a millisecond.

    A dense one takes a nanosecond for each multiply-add, and the model *rest* ms in addition.
    """

    name, dtype, why_none = "simulated", "float32", "it has no kernel for that"

    def __init__(self, linears: Sequence[Any], *, rest: float, sparse: float) -> None:
        self._rest, self._sparse = rest, sparse
        self._work = sum(each.outputs * each.inputs * each.count for each in linears)

    def model(self, batch: int, sequence: int) -> Call:
        return lambda: self._rest + 1e-6 * self._work * batch * sequence

    def dense(self, weights: Weights) -> Product:
        return Timed("dense", 1e-6 * weights[0].size * len(weights))

    def sparse(self, spec: str, weights: Weights) -> Product | None:
        if spec != "2:4":
            return None
        assert all(float((weight != 0).mean()) == 0.5 for weight in weights)
        whole = Timed("2:4", 1e-6 * self._sparse * weights[0].size * len(weights))
        return Overhead(whole)

    def close(self) -> None:
        pass

    def __enter__(self) -> "Simulated":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Overhead:
    """Half a millisecond more than another product."""

    kernel = "2:4"

    def __init__(self, product: Timed) -> None:
        self._product = product

    def at(self, tokens: int) -> Call:
        call = self._product.at(tokens)
        return lambda: call() + 0.5


def simulated(path: Path, monkeypatch: pytest.MonkeyPatch, *, rest: float, sparse: float, **options: Any) -> Prediction:
    from serve.predict.linears import read_linears

    runtime = Simulated(read_linears(path), rest=rest, sparse=sparse)
    monkeypatch.setattr(run, "open_products", lambda path, **more: runtime)
    return predict(path, **{"shapes": [(1, 8), (100, 60)], "pattern": "2:4", **options})


def test_the_whole_model_gains_what_its_layers_do(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amdahl's law with known times: tiny shapes lose by the overhead, large ones gain."""
    from serve.predict.linears import read_linears

    found = simulated(tiny_bert, monkeypatch, rest=2.0, sparse=0.5)
    linears = read_linears(tiny_bert)
    for each, tokens in zip(found.shapes, (8, 6000), strict=True):
        dense = 1e-6 * tokens * sum(one.outputs * one.inputs * one.count for one in linears)
        sparse = 0.5 * dense + 0.5 * len(linears)
        assert each.model_ms == pytest.approx(2 + dense)
        assert each.layers_ms == pytest.approx(dense)
        assert each.share == pytest.approx(dense / (2 + dense))
        assert each.limit == pytest.approx((2 + dense) / 2)
        assert each.speedup.ratio == pytest.approx((2 + dense) / (2 + sparse))
        assert each.stopped.reason == "precision"
    small, large = found.shapes
    assert small.mixed is not None
    assert small.mixed.ratio == pytest.approx(1), "every layer stays dense"
    assert large.mixed is None
    assert "keep the model dense at this shape" in found.answer(small)
    assert found.answer(large).startswith(f"{large.speedup.ratio:.2f}×, ")
    assert all(layer.sparse_kernel and layer.kernel == "2:4" for layer in large.layers)


def test_layers_that_lose_stay_dense(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = simulated(tiny_bert, monkeypatch, rest=0.0, sparse=0.5, shapes=[(4, 50)])
    (each,) = found.shapes
    findings = {layer.speedup.finding for layer in each.layers}
    assert findings == {"faster", "slower"}
    assert each.mixed is not None
    best = sum(min(layer.dense_ms, layer.sparse_ms) for layer in each.layers)
    assert each.mixed.ratio == pytest.approx(each.layers_ms / best)
    assert "with those dense that are slower" in found.answer(each)


def test_without_a_kernel_it_says_why(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = simulated(tiny_bert, monkeypatch, rest=1.0, sparse=0.5, pattern="unstructured", sparsity=0.9)
    for each in found.shapes:
        assert each.speedup.ratio == pytest.approx(1)
        assert "none of it is saved, because it has no kernel for that" in found.answer(each)
        assert not any(layer.sparse_kernel for layer in each.layers)
    assert found.sparsity == 0.9


def test_layers_of_which_few_are_timed_count_as_many(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulated(tiny_bert, monkeypatch, rest=1.0, sparse=0.5)
    monkeypatch.setattr(run, "CACHE_BYTES", 1)
    few = simulated(tiny_bert, monkeypatch, rest=1.0, sparse=0.5)
    for one, other in zip(whole.shapes, few.shapes, strict=True):
        assert one.layers_ms == pytest.approx(other.layers_ms)


@pytest.mark.parametrize("pattern", ["2:4", "structured"])
def test_on_onnx_runtime_for_real(bert_artifact: Path, pattern: str) -> None:
    found = predict(
        bert_artifact, pattern=pattern, shapes=[(1, 8), (2, 32)], engine="onnxruntime", threads=1, budget_s=2
    )
    content = json.loads(json.dumps(found.to_json()))
    assert (content["schema_version"], content["engine"], content["dtype"]) == (1, "onnxruntime-cpu", "float32")
    assert [each["shape"] for each in content["shapes"]] == ["1x8", "2x32"]
    assert len(content["answers"]) == 2
    for each in content["shapes"]:
        assert each["model_ms"] > 0
        assert each["speedup"]["low"] <= each["speedup"]["ratio"] <= each["speedup"]["high"]
        assert math.isfinite(each["layers_ms"])
        for layer in each["layers"]:
            assert not layer["sparse_kernel"]
            assert (layer["left"] == layer["shape"]) == (pattern == "2:4")
    text = found.render()
    assert ("multiply zeros like any other number" in text) == (pattern == "2:4")
    assert ("| left |" in text) == (pattern == "structured")
    assert content["answers"][0] in text


@pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="needs a C compiler")
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.9), ("2:4", None), ("unstructured", 0.4)])
def test_on_kernels_that_skip_zeros(bert_artifact: Path, pattern: str, sparsity: float | None) -> None:
    found = predict(
        bert_artifact, pattern=pattern, sparsity=sparsity, shapes=[(2, 32)], engine="onnxruntime-sparse", threads=1,
        budget_s=2,
    )  # fmt: skip
    assert found.engine == "onnxruntime-sparse"
    assert {layer.sparse_kernel for layer in found.shapes[0].layers} == {sparsity != 0.4}
    assert ("faster with at most 55% that are not zero, or in 2:4" in found.render()) == (sparsity == 0.4)


@pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="needs a C compiler")
def test_a_decoder_needs_more_zeros(tmp_path: Path) -> None:
    export(make_decoder(tmp_path / "model", "gpt2"), tmp_path / "artifact")
    for pattern, sparse in (("4:8", False), ("1:4", True), ("2:4", True)):
        found = predict(
            tmp_path / "artifact", pattern=pattern, shapes=[(2, 8)], engine="onnxruntime-sparse", threads=1, budget_s=1
        )
        assert {layer.sparse_kernel for layer in found.shapes[0].layers} == {sparse}
        assert ("with at most 35% that are not zero" in found.render()) != sparse


def test_the_command(bert_artifact: Path) -> None:
    options = ("predict", "--model", bert_artifact, "--shapes", "1x8", "--engine", "onnxruntime", "--budget", "0.5")
    report: Mapping[str, Any] = json.loads(done(*options, "--pattern", "block:4x4", "--threads", "1", "--json"))
    assert report["pattern"] == "block:4x4"
    assert report["sparsity"] == 0.5
    assert report["environment"]["command"].startswith("pst predict --model")
    refused = pst(*options, "--pattern", "3:5")
    assert refused.code == 2
    assert "5 does not divide" in refused.err


def test_user_errors(bert_artifact: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shapes": [(1, 8)], "engine": "onnxruntime"}
    refused: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "nowhere", {"pattern": "2:4"}, ArtifactError, "is no folder"),
        (bert_artifact, {"pattern": "2:4", "sparsity": 0.9}, ConfigError, r"sparsity 0\.5; leave --sparsity out"),
        (bert_artifact, {"pattern": "unstructured", "sparsity": 1.5}, PatternError, "outside"),
        (bert_artifact, {"pattern": "zigzag"}, PatternError, "Unknown pattern"),
        (bert_artifact, {"pattern": "2:4", "precision": 0}, ConfigError, "--precision"),
        (bert_artifact, {"pattern": "2:4", "shapes": [(1, 4096)]}, ConfigError, "longer than"),
    ]
    for path, more, kind, message in refused:
        with pytest.raises(kind, match=message):
            predict(path, **{**options, **more})
