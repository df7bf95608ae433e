"""Every engine that can run here, held to one behaviour; the others are skipped, with the reason.

The oracle is ONNX Runtime on the processor. On a machine with a GPU: pytest -rs tests/serve/test_conformance.py
"""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.errors import EngineError
from serve.engines import Array, Engine, open_engine

ENGINES = (
    "onnxruntime-cpu", "onnxruntime-sparse", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "torch-cpu", "torch-cuda",
)  # fmt: skip
CYCLES = {"onnxruntime-cpu": 1000, "torch-cpu": 60, "torch-cuda": 60}
"""Loads and unloads. Of PyTorch, which reads config.json and safetensors each time, fewer, since each takes far longer;
likewise of the engines on a GPU, see LEAST."""
LEAST = 200
ABSOLUTE = {"onnxruntime-cpu": 1e-5, "onnxruntime-sparse": 1e-5, "torch-cpu": 1e-5}
"""Largest difference of a logit; GPUs compute float32 products in TensorFloat-32, whose fraction has 10 bits."""
GPU_ABSOLUTE = 5e-3
MOST_GROWTH_MIB = 8.0
"""Of resident memory, from the tenth part of the cycles to the last. A model of this test that stays behind each time
would be 100 KiB at least, so that a thousand of them make 100 MiB."""


def feeds_of(batch: int, length: int, *, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "input_ids": random.integers(5, 30, (batch, length), dtype=np.int64),
        "attention_mask": np.ones((batch, length), dtype=np.int64),
        "token_type_ids": random.integers(0, 2, (batch, length), dtype=np.int64),
    }


def resident_mib() -> float:
    """Memory of this process, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmRSS")


@pytest.fixture(scope="module", params=ENGINES)
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def exported_model(engine_name: str, bert_artifact: Path, mostly_zeros: Path) -> Path:
    return mostly_zeros if engine_name == "onnxruntime-sparse" else bert_artifact


@pytest.fixture(scope="module")
def folder(engine_name: str, exported_model: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the engine opens; a copy, since a plan is kept beside it. Skips where the engine cannot run."""
    source = tiny_bert if engine_name.startswith("torch") else exported_model
    path = shutil.copytree(source, tmp_path_factory.mktemp(engine_name) / "model")
    try:
        open_engine(path, engine=engine_name, threads=1).close()
    except EngineError as error:
        pytest.skip(f"{engine_name}: {error}")
    return path


@pytest.fixture
def engine(engine_name: str, folder: Path) -> Iterator[Engine]:
    with open_engine(folder, engine=engine_name, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def oracle(exported_model: Path) -> Iterator[Callable[[dict[str, Array]], Array]]:
    """The logits of ONNX Runtime on the processor."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed, which the others are compared with")
    with open_engine(exported_model, engine="onnxruntime-cpu", threads=1) as opened:
        yield lambda feeds: opened.infer(feeds)["logits"]


def test_same_answers_at_changing_shapes(
    engine_name: str, engine: Engine, oracle: Callable[[dict[str, Array]], Array]
) -> None:
    shapes = [(1, 1), (1, 7), (3, 64), (8, 16), (1, 7), (32, 2), *[(2, 9)] * 8, (1, 1)]
    for seed, shape in enumerate(shapes):
        feeds = feeds_of(*shape, seed=seed)
        answer = engine.infer(feeds)["logits"]
        assert answer.dtype == np.float32
        assert answer.flags.writeable
        np.testing.assert_allclose(answer, oracle(feeds), rtol=0, atol=ABSOLUTE.get(engine_name, GPU_ABSOLUTE))


def test_the_same_question_twice(engine: Engine) -> None:
    feeds = feeds_of(2, 9)
    first = engine.infer(feeds)["logits"]
    kept = first.copy()
    for seed in range(6):
        engine.infer(feeds_of(2, 9, seed=seed + 1))
    np.testing.assert_array_equal(first, kept)  # the arrays are the caller's
    np.testing.assert_allclose(engine.infer(feeds)["logits"], kept, rtol=0, atol=1e-5)


def test_feeds_need_not_lie_one_after_the_other(engine: Engine) -> None:
    feeds = feeds_of(4, 6)
    turned = {name: np.asfortranarray(value) for name, value in feeds.items()}
    np.testing.assert_allclose(engine.infer(turned)["logits"], engine.infer(feeds)["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": None}, "takes the inputs .*input_ids"),
        ({"extra": np.zeros((2, 5), np.int64)}, "extra"),
        ({"input_ids": np.zeros((2, 5), np.int32)}, "array of int64, but is int32"),
        ({"input_ids": np.zeros((2, 5), np.float32)}, "array of int64, but is float32"),
        ({"input_ids": [[1, 2]]}, "array of int64, but is list"),
        ({"input_ids": np.zeros(5, np.int64)}, "2 dimensions"),
        ({"attention_mask": np.ones((2, 6), np.int64)}, "must agree"),
        ({name: np.ones((0, 5), np.int64) for name in feeds_of(1, 1)}, "is empty"),
        ({name: np.ones((2, 0), np.int64) for name in feeds_of(1, 1)}, "is empty"),
        ({name: np.ones((1, 65), np.int64) for name in feeds_of(1, 1)}, "65 tokens.*positions for 64; truncate"),
    ],
    ids=["missing", "extra", "int32", "float", "list", "rank", "disagree", "no-rows", "no-tokens", "too-long"],
)
def test_wrong_feeds_are_refused_and_harm_nothing(engine: Engine, change: dict[str, Any], words: str) -> None:
    before = engine.infer(feeds_of(2, 5))["logits"]
    feeds = {name: value for name, value in {**feeds_of(2, 5), **change}.items() if value is not None}
    with pytest.raises(EngineError, match=words):
        engine.infer(feeds)
    np.testing.assert_allclose(engine.infer(feeds_of(2, 5))["logits"], before, rtol=0, atol=1e-5)


def test_closed_and_opened_again(engine_name: str, folder: Path, engine: Engine) -> None:
    feeds = feeds_of(2, 5)
    before = engine.infer(feeds)["logits"]
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.infer(feeds)
    with open_engine(folder, engine=engine_name, threads=1) as again:
        np.testing.assert_allclose(again.infer(feeds)["logits"], before, rtol=0, atol=1e-5)


def test_two_at_once(engine_name: str, folder: Path, engine: Engine) -> None:
    with open_engine(folder, engine=engine_name, threads=1) as other:
        for seed in range(8):
            feeds, more = feeds_of(2, 5, seed=seed), feeds_of(1, 9, seed=seed)
            np.testing.assert_allclose(engine.infer(feeds)["logits"], other.infer(feeds)["logits"], rtol=0, atol=1e-5)
            other.infer(more)
    assert np.isfinite(engine.infer(feeds_of(2, 5))["logits"]).all()  # closing the other took nothing from it


def growth_mib(cycles: int, once: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> float:
    """What *once* adds to this process, in MiB, from the tenth part of the cycles to the last."""
    after_warmup = 0.0
    for cycle in range(cycles):
        once()
        if cycle == cycles // 10:
            gc.collect()
            after_warmup = resident_mib()
        capsys.readouterr()  # notes, which would be kept till the end
    gc.collect()
    return resident_mib() - after_warmup


def test_no_memory_is_left_behind(
    engine_name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cycles, feeds, opened = CYCLES.get(engine_name, LEAST), feeds_of(1, 4), 0

    def ours() -> None:
        with open_engine(folder, engine=engine_name, threads=1) as one:
            one.infer(feeds)

    allowed = MOST_GROWTH_MIB
    if engine_name == "onnxruntime-cuda":  # whose own sessions leave some on a GPU; ours may leave as much, and no more
        import onnxruntime

        bare = onnxruntime.InferenceSession

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal opened
            opened += 1
            return bare(*arguments, **options)

        def theirs() -> None:
            bare(str(folder / "model.onnx"), providers=["CUDAExecutionProvider", "CPUExecutionProvider"]).run(
                None, feeds
            )

        with monkeypatch.context() as patched:
            patched.setattr(onnxruntime, "InferenceSession", counted)
            ours()
        allowed += max(0.0, growth_mib(cycles * opened, theirs, capsys))
    grown = growth_mib(cycles, ours, capsys)
    assert grown < allowed, f"{grown:.1f} MiB more after {cycles} loads and unloads of {engine_name}, of {allowed:.1f}"
