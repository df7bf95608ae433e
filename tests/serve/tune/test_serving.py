"""Serving what was tuned for TensorRT, against stand-ins: the plan that was measured, and all other shapes as well."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from serve.classify import Classifier
from serve.engines import Shapes, open_engine
from serve.engines.tensorrt import TensorRTEngine
from serve.generate import Generator
from serve.tune.run import tune
from serve.tune.serving import serving
from tests.decoders import make_decoder
from tests.serve.engines.tensorrt_stand_in import TensorRT, stand_in

LONGEST = "a lovely film and a dull one " * 20


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TensorRT:
    return stand_in(monkeypatch, tmp_path / "cache", version="10.13.0")


@pytest.mark.parametrize("spanned", [False, True])
def test_a_classifier(trt: TensorRT, bert_artifact: Path, tmp_path: Path, spanned: bool) -> None:
    mine = Path(shutil.copytree(bert_artifact, tmp_path / "bert"))
    tune(
        [mine], shapes=[(4, 8), (1, 8)], output=tmp_path / "tuned", engine="tensorrt", runs=2, warmup=1, threads=1,
        receipt=False, spanned=spanned,
    )  # fmt: skip
    (build,) = trt.builds
    wide = "1x1,8x64,32x64"
    more = Shapes(fixed=((4, 8), (1, 8), (2, 4)))
    open_engine(mine, engine="tensorrt", shapes=more).close()  # a newer plan, which takes all of these shapes as well
    assert trt.builds.pop() != build
    found = serving(tmp_path / "tuned", engine="auto", threads=0)
    with (
        Classifier(bert_artifact, engine="onnxruntime-cpu", threads=1) as oracle,
        Classifier(found.path, engine=found.engine, threads=found.threads, shapes=found.shapes) as model,
    ):
        assert isinstance(model.engine, TensorRTEngine)
        assert trt.builds == [build]  # the plan that was measured
        profiles = list(map(str, model.engine.plan.profiles))
        assert profiles == (["1x8,4x8,4x8", wide] if spanned else ["4x8", "1x8", wide])
        model.warm_up()
        texts = ["the film", "a lovely film", LONGEST]
        for batch in (texts[:1], texts[1:2], texts[:2] * 2, texts, texts * 10):
            rows = oracle.encoder.tokenize(batch)
            np.testing.assert_allclose(model.logits(rows), oracle.logits(rows), atol=1e-5)
        lanes = {profiles[index]: lane for index, lane in model.engine._lanes.items()}
        assert lanes.keys() == set(profiles)
        if not spanned:
            assert all(lanes[each].is_captured for each in ("4x8", "1x8"))
    assert trt.builds == [build]


def test_a_decoder(trt: TensorRT, tmp_path: Path) -> None:
    from export.pipeline import export

    gpt2 = tmp_path / "gpt2"
    export(make_decoder(tmp_path / "model", "gpt2"), gpt2)
    tune(
        [gpt2], shapes=[(1, 4)], output=tmp_path / "tuned", engine="tensorrt", runs=2, warmup=1, threads=1,
        receipt=False, new_tokens=4,
    )  # fmt: skip
    (build,) = trt.builds
    found = serving(tmp_path / "tuned", engine="auto", threads=0)
    with (
        Generator(gpt2, engine="onnxruntime-cpu", threads=1) as oracle,
        Generator(found.path, engine=found.engine, threads=found.threads, shapes=found.shapes) as model,
    ):
        for prompts in ([[5, 6, 7, 8]], [[5, 6], [7, 8, 9]]):
            assert model.generate(prompts, max_new_tokens=6) == oracle.generate(prompts, max_new_tokens=6)
        assert isinstance(model.engine, TensorRTEngine)
        used = {str(model.engine.plan.profiles[index]) for index in model.engine._lanes}
        assert used == {"1x4+0..0", "1x1+4..8", "1x1,8x64,32x64"}
    assert trt.builds == [build]
