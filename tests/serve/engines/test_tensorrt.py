"""The engine on TensorRT against stand-ins for 8.6 and 10, which compute with ONNX Runtime; real plans need a GPU."""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.manifest import Manifest
from pst.errors import ArtifactError, EngineError
from pst.files import read_json
from serve.decoding import Decoding, empty_cache
from serve.engines import Array, CachingEngine, Shapes, cache_inputs, open_engine
from serve.engines._tensorrt_lane import REPEATS
from serve.engines.tensorrt import TensorRTEngine
from tests.serve.engines.tensorrt_stand_in import Code, TensorRT, stand_in

FIXED = Shapes(fixed=((2, 8), (1, 8)))


def feeds_of(batch: int, length: int, *, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    ids: Array = random.integers(5, 30, (batch, length), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def shapes_of(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds_of(batch, length).items()}


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
    assert len(trt.builds) == 1  # that plan takes it as well
    opened(mine, Shapes(fixed=((2, 9),), others=False)).close()
    assert [profile["input_ids"] for profile in trt.builds[1]["profiles"]] == [[[2, 9]] * 3]
    opened(mine, Shapes()).close()
    assert [profile["input_ids"] for profile in trt.builds[2]["profiles"]] == [[[1, 1], [8, 64], [32, 64]]]
    assert [build["timings"] for build in trt.builds] == ["", "timings", "timings"]  # shared by all plans


def test_the_narrowest_profile_runs(trt: TensorRT, mine: Path) -> None:
    with opened(mine, FIXED) as engine:
        lanes = [engine.lane(shapes_of(*shape)) for shape in [(2, 8), (1, 8), (3, 5), (2, 8)]]
        assert len({id(lane) for lane in lanes}) == 3
        assert lanes[3] is lanes[0]
        profiles = [lane.context.profile for lane in lanes]
        assert [str(engine.plan.profiles[index]) for index in profiles] == ["2x8", "1x8", "1x1,8x64,32x64", "2x8"]


def test_a_shape_that_repeats_becomes_a_graph(trt: TensorRT, mine: Path) -> None:
    with opened(mine, FIXED) as engine:
        trt.cuda.calls.clear()
        for seed in range(REPEATS + 3):
            engine.infer(feeds_of(2, 8, seed=seed))
        one = ["copy", "execute", "copy"]
        assert trt.cuda.calls == one * (REPEATS + 1) + ["launch"] * 3  # the last ones are the capture itself
        assert engine.lane(shapes_of(2, 8)).is_captured
        for length in (3, 4, 3, 4, 3, 4, 3, 4):
            engine.infer(feeds_of(1, length))
        assert not engine.lane(shapes_of(1, 4)).is_captured
        assert engine.lane(shapes_of(2, 8)).is_captured  # the other profile's stays


def test_where_nothing_can_be_captured_it_runs_all_the_same(trt: TensorRT, mine: Path) -> None:
    trt.cuda.can_capture = False
    with opened(mine, FIXED) as engine:
        answers = [engine.infer(feeds_of(2, 8))["logits"] for _ in range(REPEATS + 3)]
        assert not engine.lane(shapes_of(2, 8)).is_captured
        for answer in answers[1:]:
            np.testing.assert_array_equal(answer, answers[0])
    assert "launch" not in trt.cuda.calls


def test_what_goes_wrong_on_the_gpu_is_said_and_leaves_nothing(
    trt: TensorRT, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(stream: int) -> tuple[Code]:
        trt.cuda.stream.clear()
        return (Code(700),)

    with opened(mine, FIXED) as engine:
        monkeypatch.setattr(trt.cuda, "cudaStreamSynchronize", fault)
        with pytest.raises(EngineError, match=r"CUDA fails in cudaStreamSynchronize \(cudaErrorStandIn\)"):
            engine.infer(feeds_of(2, 8))
    assert trt.cuda.memory == {}


def test_an_engine_that_nobody_closed(trt: TensorRT, mine: Path) -> None:
    opened(mine, FIXED).infer(feeds_of(2, 8))
    gc.collect()
    assert trt.cuda.memory == {}
    assert trt.cuda.streams == 0


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
    plan_of(mine, profiles=[parse_profile("1x8,2x8,4x16", max_length=64)])  # no short texts
    with opened(mine, Shapes()) as engine:
        assert engine.plan.path == made.path


def test_the_order_of_the_shapes_makes_no_other_plan(trt: TensorRT, mine: Path) -> None:
    some = ((2, 8), (1, 8), (4, 16))
    with opened(mine, Shapes(fixed=some)) as engine:
        made = engine.plan
    opened(mine, Shapes(fixed=(*some, (8, 8)))).close()  # newer, with more shapes than are wanted
    assert len(trt.builds) == 2
    for shapes in (some[::-1], (some[1], some[2], some[0]), some):
        with opened(mine, Shapes(fixed=shapes)) as engine:
            assert engine.plan == made
            lanes = [engine.lane(shapes_of(*shape)) for shape in shapes]
            assert [made.profiles[lane.context.profile].usual for lane in lanes] == list(shapes)
    trt.refuses = {"stdVersionRead == serializationVersion"}
    opened(mine, Shapes(fixed=some[::-1])).close()
    opened(mine, Shapes(fixed=some)).close()  # takes what was built again, not the one that did not fit
    assert len(trt.builds) == 3


def test_the_order_of_spanned_shapes_of_one_size(trt: TensorRT, mine: Path) -> None:
    for shapes in (((1, 16), (2, 8)), ((2, 8), (1, 16))):
        with opened(mine, Shapes(fixed=shapes, spanned=True)) as engine:
            assert str(engine.plan.profiles[0]) == "1x8,1x16,2x16"
    assert len(trt.builds) == 1


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


def layer(name: str, kind: str = "CaskConvolution", tactic: str = "") -> dict[str, str]:
    return {"Name": name, "LayerType": kind, "TacticName": tactic}


def test_bench_with_a_receipt(
    trt: TensorRT, mine: Path, sparse_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of convolutions, two of them side by side, and all that is around them."""
    from export.pipeline import export
    from serve.bench.runner import bench
    from serve.engines._onnx_nodes import computing_nodes, read_nodes

    export(sparse_model("2:4"), tmp_path / "conv", linear_form="conv", precision="fp16")
    nodes = read_nodes(tmp_path / "conv" / "model.onnx")
    weights = [weight.initializer for weight in Manifest.load(tmp_path / "conv").weights]
    names = [nodes[places[0]].name for places in computing_nodes(nodes, weights).values()]
    pair, *alone = [f"{names[0]} || {names[1]}", *names[2:]]
    region = f"{{ForeignNode[{nodes[0].name}...{nodes[-1].name}]}}"
    sparse, dense = "sm80_xmma_sparse_conv_f16f16_f16f16", "sm80_xmma_fprop_implicit_gemm_f16f16"
    tactics = [
        layer(pair, tactic=dense),
        layer(alone[0], tactic=sparse),
        *(layer(name, tactic=dense) for name in alone[1:]),
    ]
    trt.layers = [
        *tactics,
        layer(region, "Myelin"),
        layer(f"Reformatting CopyNode for Input Tensor 0 to {pair}", "Reformat"),
    ]
    trt.says = [
        f"(Sparsity) Layers eligible for sparse math: {pair}, {alone[0]}, {alone[1]}",
        f"(Sparsity) TRT inference plan picked sparse implementation for layers: {alone[0]}",
    ]
    report = bench(
        [mine, tmp_path / "conv"], shapes=[(1, 8), (2, 8)], output=tmp_path / "report", threads=1, warmup=1, runs=3,
        precision=0, engine="tensorrt",
    )  # fmt: skip
    assert all(subject.plan_bytes for subject in report.subjects)
    assert {subject.engine for subject in report.subjects} == {f"tensorrt-{trt.__version__}"}
    dense_receipt, receipt = report.receipts[:2]
    assert {each.sparse_kernel for each in dense_receipt.layers} == {False}
    assert {each.why for each in dense_receipt.layers} == {"there are no zeros to speak of"}
    assert receipt.total_ms == len(trt.layers)
    told = [(each.eligible, each.sparse_kernel, each.fused, each.time_ms, each.fused_ms) for each in receipt.layers]
    assert told == [
        (True, False, 1, None, 1.0), (True, False, 1, None, 1.0), (True, True, 0, 1.0, None),
        (True, False, 0, 1.0, None), *[(False, False, 0, 1.0, None)] * (len(weights) - 4),
    ]  # fmt: skip
    assert [each.kernel for each in receipt.layers[1:3]] == [dense, sparse]
    assert receipt.limit is None
    text = (tmp_path / "report" / "report.md").read_text()
    assert "2 of these layers are fused with others; what they are fused into takes 1.00 of" in text
    assert "chosen 1 of 2" in text
    assert "measured a dense kernel to be faster at this shape" in text
    assert "No receipt" not in capsys.readouterr().err
    assert trt.cuda.memory == {}


@pytest.fixture
def gpt2(exported: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    return shutil.copytree(exported("gpt2")[1], tmp_path / "gpt2")


def test_a_decoder_runs_with_its_cache_on_the_host(trt: TensorRT, gpt2: Path) -> None:
    shapes = Shapes(fixed=((2, 4),), others=True, new_tokens=4)
    with open_engine(gpt2, engine="onnxruntime-cpu", threads=1) as oracle, opened(gpt2, shapes) as engine:
        feeds: dict[str, Array] = {
            "input_ids": np.array([[5, 6, 7, 8], [9, 10, 11, 12]]), "attention_mask": np.ones((2, 4), np.int64),
            "position_ids": np.arange(4)[None].repeat(2, axis=0), **empty_cache(engine.inputs, 2),
        }  # fmt: skip
        for _ in range(8):  # four tokens more than the plan was tuned for
            ours, theirs = engine.infer(feeds), oracle.infer(feeds)
            for name, array in theirs.items():
                np.testing.assert_allclose(ours[name], array, atol=1e-6)
            tokens = theirs["logits"][:, -1:].argmax(axis=-1)
            past = {name: theirs[name.replace("past_key_values", "present")] for name in cache_inputs(engine.inputs)}
            mask: Array = np.ones((2, feeds["attention_mask"].shape[1] + 1), np.int64)
            place: Array = np.full((2, 1), mask.shape[1] - 1)
            feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": place, **past}
        used = {str(engine.plan.profiles[index]) for index in engine._lanes}
        assert used == {"2x4+0..0", "2x1+4..8", "1x1,8x64,32x64"}
    assert trt.cuda.graphs == 0
    assert trt.cuda.memory == {}


def next_feeds(tokens: Array, past: int) -> dict[str, Array]:
    rows, count = tokens.shape
    return {
        "input_ids": tokens, "attention_mask": np.ones((rows, past + count), np.int64),
        "position_ids": np.arange(past, past + count)[None].repeat(rows, axis=0),
    }  # fmt: skip


def test_a_cache_stays_on_the_gpu(trt: TensorRT, gpt2: Path) -> None:
    with (
        open_engine(gpt2, engine="onnxruntime-cpu", threads=1) as oracle,
        opened(gpt2, Shapes(fixed=((2, 4),), others=True, new_tokens=4)) as engine,
    ):
        prompt: Array = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
        cache = engine.cache(empty_cache(engine.inputs, 2))
        scores = cache.extend(next_feeds(prompt, 0))
        expected = oracle.infer(next_feeds(prompt, 0) | empty_cache(engine.inputs, 2))
        past = {name: expected[name.replace("past_key_values", "present")] for name in cache_inputs(engine.inputs)}
        np.testing.assert_allclose(scores, expected["logits"][:, -1], atol=1e-6)
        other, tokens = cache.copy(), prompt
        blocks = []
        for length in range(4, 16):
            tokens = np.concatenate([tokens, scores.argmax(axis=-1)[:, None]], axis=1)
            scores = cache.extend(next_feeds(tokens[:, -1:], length))
            expected = oracle.infer(next_feeds(tokens, 0) | empty_cache(engine.inputs, 2))
            np.testing.assert_allclose(scores, expected["logits"][:, -1], atol=1e-5)
            blocks.append(len(trt.cuda.memory))
        for name, array in cache.arrays().items():
            np.testing.assert_allclose(array, expected[name.replace("past_key_values", "present")], atol=1e-5)
        for name, array in other.arrays().items():
            np.testing.assert_array_equal(array, past[name])  # the copy is where it was
        assert len(set(blocks[-5:])) == 1  # blocks are used again
        again = engine.cache(cache.arrays())
        step = next_feeds(tokens[:, -1:], 16)
        np.testing.assert_array_equal(again.extend(step), cache.extend(step))
        with pytest.raises(EngineError, match="must agree in batch_size"):
            cache.extend({**step, "position_ids": step["position_ids"][:1]})
        with pytest.raises(EngineError, match="attention_mask must be 18 long, past and new tokens, but is 20"):
            cache.extend({**step, "attention_mask": np.ones((2, 20), np.int64)})
        feeds = next_feeds(prompt, 0) | empty_cache(engine.inputs, 2)  # the other way in between
        np.testing.assert_allclose(engine.infer(feeds)["logits"], oracle.infer(feeds)["logits"], atol=1e-6)
        engine.infer(feeds)
        np.testing.assert_array_equal(
            again.extend(next_feeds(tokens[:, -1:], 17)), cache.extend(next_feeds(tokens[:, -1:], 17))
        )
    with pytest.raises(EngineError, match="closed"):
        cache.extend(next_feeds(tokens[:, -1:], 18))
    with pytest.raises(EngineError, match="closed"):
        cache.arrays()
    assert trt.cuda.memory == {}


def test_unused_blocks_make_room(trt: TensorRT, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(gpt2, Shapes()) as engine:
        first = engine.pool.take(1000)
        del first
        assert len(trt.cuda.memory) == 1
        room = trt.cuda.cudaMalloc
        monkeypatch.setattr(trt.cuda, "cudaMalloc", lambda size: (Code(2), 0) if trt.cuda.memory else room(size))
        block = engine.pool.take(100_000)
        with pytest.raises(EngineError, match=r"cudaMalloc \(cudaErrorStandIn\); if it is short of memory"):
            engine.pool.take(100_000)
        del block


def test_decoding_goes_through_the_cache_on_the_gpu(trt: TensorRT, gpt2: Path) -> None:
    shapes = Shapes(fixed=((2, 4),), others=True, new_tokens=4)
    with open_engine(gpt2, engine="onnxruntime-cpu", threads=1) as oracle, opened(gpt2, shapes) as engine:
        assert isinstance(engine, CachingEngine)
        ours, theirs = Decoding(engine, pad_id=0), Decoding(oracle, pad_id=0)
        scores = ours.join([[5, 6, 7, 8], [9, 10]]), theirs.join([[5, 6, 7, 8], [9, 10]])
        for turn in range(8):
            np.testing.assert_allclose(*scores, atol=1e-5)
            tokens = scores[1].argmax(axis=-1)
            scores = ours.step(tokens), theirs.step(tokens)
            if turn == 3:
                np.testing.assert_allclose(ours.join([[11]]), theirs.join([[11]]), atol=1e-5)
                for each in (ours, theirs):
                    each.keep(np.array([True, False, True]))
                scores = ours.step(np.array([4, 5])), theirs.step(np.array([4, 5]))
        used = {str(engine.plan.profiles[index]) for index in engine._lanes}
        assert used == {"2x4+0..0", "2x1+4..8", "1x1,8x64,32x64"}
    assert trt.cuda.memory == {}


def test_bench_of_a_decoder(trt: TensorRT, gpt2: Path, tmp_path: Path) -> None:
    from serve.bench.runner import bench

    report = bench(
        [gpt2], shapes=[(2, 4)], output=tmp_path / "report", threads=1, warmup=1, runs=2, engine="tensorrt",
        new_tokens=4, receipt=False,
    )  # fmt: skip
    assert [each.workload for each in report.measurements] == ["2x4 prompt", "2x4 +4 tokens"]
    (build,) = trt.builds
    assert [profile["input_ids"] for profile in build["profiles"]] == [[[2, 4]] * 3, [[2, 1]] * 3]
    assert [profile["past_key_values.0.key"][2][2] for profile in build["profiles"]] == [0, 8]
