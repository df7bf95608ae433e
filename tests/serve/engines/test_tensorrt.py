"""The engine on TensorRT against stand-ins for 8.6 and 10, which compute with ONNX Runtime; real plans need a GPU."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pst.errors import ArtifactError, EngineError
from pst.files import read_json
from serve.engines import Array, Shapes, open_engine
from serve.engines._tensorrt_lane import REPEATS
from serve.engines.tensorrt import TensorRTEngine
from tests.serve.engines.tensorrt_stand_in import TensorRT, stand_in

FIXED = Shapes(fixed=((2, 8), (1, 8)))


def feeds_of(batch: int, length: int, *, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    ids: Array = random.integers(5, 30, (batch, length), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.fixture(params=["8.6.1", "10.13.0"])
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TensorRT:
    return stand_in(monkeypatch, tmp_path / "cache", version=request.param)


@pytest.fixture
def mine(bert_artifact: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bert_artifact, tmp_path / "artifact")


def opened(path: Path, shapes: Shapes) -> TensorRTEngine:
    engine = open_engine(path, engine="tensorrt", threads=1, shapes=shapes)
    assert isinstance(engine, TensorRTEngine)
    return engine


def test_same_answers_at_changing_shapes(trt: TensorRT, mine: Path) -> None:
    with open_engine(mine, engine="onnxruntime-cpu", threads=1) as oracle, opened(mine, FIXED) as engine:
        assert engine.inputs == oracle.inputs
        assert engine.outputs == oracle.outputs
        assert engine.max_length == oracle.max_length
        for seed, shape in enumerate([(1, 8), (2, 8), (3, 5), (32, 64), (1, 1), *[(2, 8)] * 9, (3, 5), (2, 8), (1, 8)]):
            feeds = feeds_of(*shape, seed=seed)
            answer = engine.infer(feeds)["logits"]
            assert answer.dtype == np.float32
            np.testing.assert_array_equal(answer, oracle.infer(feeds)["logits"])
    assert trt.cuda.memory == {}
    assert (trt.cuda.graphs, trt.cuda.streams) == (0, 0)


def test_what_a_build_is_asked_for(trt: TensorRT, mine: Path) -> None:
    opened(mine, FIXED).close()
    (build,) = trt.builds
    ids = [profile["input_ids"] for profile in build["profiles"]]
    assert ids == [[[2, 8]] * 3, [[1, 8]] * 3, [[1, 1], [8, 64], [32, 64]]]
    assert build["verbosity"] == "DETAILED"
    opened(mine, FIXED).close()
    assert len(trt.builds) == 1  # from the cache
    opened(mine, Shapes(fixed=((2, 8),), others=False)).close()
    assert [profile["input_ids"] for profile in trt.builds[1]["profiles"]] == [[[2, 8]] * 3]
    opened(mine, Shapes()).close()
    assert [profile["input_ids"] for profile in trt.builds[2]["profiles"]] == [[[1, 1], [8, 64], [32, 64]]]
    assert [build["timings"] for build in trt.builds] == ["", "timings", "timings"]  # shared by all plans


def test_the_narrowest_profile_runs(trt: TensorRT, mine: Path) -> None:
    with opened(mine, FIXED) as engine:
        lanes = [engine.lane(feeds_of(*shape)) for shape in [(2, 8), (1, 8), (3, 5), (2, 8)]]
        assert len({id(lane) for lane in lanes}) == 3
        assert lanes[3] is lanes[0]
        profiles = [lane.context.profile for lane in lanes]
        assert [str(engine.plan.profiles[index]) for index in profiles] == ["2x8", "1x8", "1x1,8x64,32x64", "2x8"]


def test_a_shape_that_repeats_becomes_a_graph(trt: TensorRT, mine: Path) -> None:
    with opened(mine, FIXED) as engine:
        trt.cuda.calls.clear()
        for seed in range(REPEATS + 3):
            engine.infer(feeds_of(2, 8, seed=seed))
        one = ["copy", "copy", "copy", "execute", "copy"]
        assert trt.cuda.calls == one * (REPEATS + 1) + ["launch"] * 3  # the last ones are the capture itself
        assert engine.lane(feeds_of(2, 8)).is_captured
        for length in (3, 4, 3, 4, 3, 4, 3, 4):
            engine.infer(feeds_of(1, length))
        assert not engine.lane(feeds_of(1, 4)).is_captured
        assert engine.lane(feeds_of(2, 8)).is_captured  # the other profile's stays


def test_where_nothing_can_be_captured_it_runs_all_the_same(trt: TensorRT, mine: Path) -> None:
    trt.cuda.can_capture = False
    with opened(mine, FIXED) as engine:
        answers = [engine.infer(feeds_of(2, 8))["logits"] for _ in range(REPEATS + 3)]
        assert not engine.lane(feeds_of(2, 8)).is_captured
        for answer in answers[1:]:
            np.testing.assert_array_equal(answer, answers[0])
    assert "launch" not in trt.cuda.calls


def test_shapes_that_no_profile_takes(trt: TensorRT, mine: Path) -> None:
    with opened(mine, Shapes()) as engine:
        with pytest.raises(
            EngineError, match=r"takes the shapes 1x1,8x64,32x64 .*but input_ids is 33 x 8; give smaller"
        ):
            engine.infer(feeds_of(33, 8))
        assert engine.infer(feeds_of(32, 8))["logits"].shape == (32, 2)


def test_a_plan_that_does_not_fit_is_built_again(trt: TensorRT, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(mine, Shapes()).close()
    trt.refuses = {"stdVersionRead == serializationVersion"}
    with opened(mine, Shapes()) as engine:
        assert engine.infer(feeds_of(1, 4))["logits"].shape == (1, 2)
    assert len(trt.builds) == 2
    assert "does not fit this machine; building it again" in capsys.readouterr().err
    trt.refuses = {"once", "twice"}
    with pytest.raises(EngineError, match=r"tensorrt [\d.]+ does not load the plan that it built \(Serial.*\); delete"):
        opened(mine, Shapes())
    assert trt.cuda.memory == {}
    assert trt.cuda.streams == 0


def test_a_plan_of_pst_export_is_found(trt: TensorRT, mine: Path) -> None:
    from export.targets.tensorrt import parse_profile, plan_of

    made = plan_of(mine, profiles=[parse_profile("1x1,2x8,4x16", max_length=64)])
    opened(mine, Shapes(fixed=((2, 8),), others=False)).close()  # newer, but it takes one shape alone
    with opened(mine, Shapes()) as engine:
        assert engine.plan.path == made.path


def test_the_log_of_the_build_is_kept(trt: TensorRT, mine: Path) -> None:
    trt.says = ["(Sparsity) Layers eligible for sparse math: a, b + c", "Engine generation completed in 3.2 seconds."]
    with opened(mine, Shapes()) as engine:
        assert engine.plan.record["sparsity"] == trt.says[:1]
    with opened(mine, Shapes()) as engine:
        assert engine.plan.record["sparsity"] == trt.says[:1]
        assert read_json(engine.plan.path.with_suffix(".json"), EngineError, "")["sparsity"] == trt.says[:1]


def test_what_is_missing_is_said(trt: TensorRT, mine: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArtifactError, match="is no artifact folder; the engine tensorrt wants one that pst export"):
        opened(tiny_bert, Shapes())
    with pytest.raises(EngineError, match="tensorrt-10 is not an engine; choose tensorrt or tensorrt-rtx"):
        open_engine(mine, engine="tensorrt-10")
    trt.cuda.devices = 0
    with pytest.raises(EngineError, match=r"No NVIDIA GPU can be used here \(cudaErrorStandIn\); check the driver"):
        opened(mine, Shapes())
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match="cuda-bindings is not installed; install it with: pip install cuda-bindings"):
        opened(mine, Shapes())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="tensorrt is not installed, so that no plan can be built; install it: pip"):
        opened(mine, Shapes())
    assert trt.builds == []


def test_a_decoder_runs_with_its_cache(
    trt: TensorRT, exported: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    from serve.decoding import Decoding

    path = shutil.copytree(exported("gpt2")[1], tmp_path / "gpt2")
    shapes = Shapes(fixed=((2, 4),), others=True, new_tokens=4)
    with open_engine(path, engine="onnxruntime-cpu", threads=1) as oracle, opened(path, shapes) as engine:
        ours, theirs = Decoding(engine, pad_id=0), Decoding(oracle, pad_id=0)
        prompts = [[5, 6, 7, 8], [9, 10]]
        scores = ours.join(prompts), theirs.join(prompts)
        for _ in range(8):  # four tokens more than the plan was tuned for
            np.testing.assert_allclose(*scores, atol=1e-6)
            tokens = scores[1].argmax(axis=-1)
            scores = ours.step(tokens), theirs.step(tokens)
        used = {str(engine.plan.profiles[index]) for index in engine._lanes}
        assert used == {"2x4+0..0", "2x1+4..8", "1x1,8x64,32x64"}
    assert trt.cuda.graphs == 0
    assert trt.cuda.memory == {}
