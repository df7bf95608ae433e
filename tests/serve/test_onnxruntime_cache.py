"""A cache of ONNX Runtime's values gives what the cache on the host gives, which test_decoding.py holds to PyTorch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from pst.errors import EngineError
from serve.decoding import Decoding, HostCache, empty_cache, open_cache
from serve.engines import Array, CachingEngine, Engine, open_engine
from serve.engines._onnxruntime_cache import OrtCache
from serve.engines._onnxruntime_cuda import FusedSessions

from ..decoders import KINDS

Exported = Callable[[str], tuple[Path, Path]]


def _prompt(random: Any, rows: int, tokens: int) -> dict[str, Array]:
    """Rows of random length, padded on the left."""
    mask = np.ones((rows, tokens), dtype=np.int64)
    for row in range(1, rows):
        mask[row, : int(random.integers(0, tokens))] = 0
    ids = random.integers(4, 35, (rows, tokens)) * mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}


def _next(feeds: dict[str, Array], tokens: Array) -> dict[str, Array]:
    mask = np.concatenate([feeds["attention_mask"], np.ones((len(tokens), 1), dtype=np.int64)], axis=1)
    positions = mask.sum(axis=1, keepdims=True) - 1
    return {"input_ids": tokens[:, None].astype(np.int64), "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_with_the_cache_on_the_host(exported: Exported, kind: str) -> None:
    random = np.random.default_rng(7)
    with open_engine(exported(kind)[1], threads=1) as engine:
        assert isinstance(engine, CachingEngine)
        for rows, tokens in ((1, 1), (1, 9), (3, 12), (5, 4)):
            feeds, past = _prompt(random, rows, tokens), empty_cache(engine.inputs, rows)
            one, other = open_cache(engine, past), HostCache(engine, past)
            assert isinstance(one, OrtCache)
            for _ in range(8):
                scores, expected = one.extend(feeds), other.extend(feeds)
                assert scores.shape == (rows, 35)
                np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
                np.testing.assert_array_equal(scores.argmax(axis=-1), expected.argmax(axis=-1))
                feeds = _next(feeds, scores.argmax(axis=-1))
            for name, array in other.arrays().items():
                np.testing.assert_allclose(one.arrays()[name], array, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_a_cache_was_made_of_may_go(exported: Exported, kind: str) -> None:
    random = np.random.default_rng(9)
    with open_engine(exported(kind)[1], threads=1) as engine:
        feeds = _prompt(random, 3, 7)
        start = HostCache(engine, empty_cache(engine.inputs, 3))
        feeds = _next(feeds, start.extend(feeds).argmax(axis=-1))
        sizes = [array.size for array in start.arrays().values()]
        caches = [open_cache(engine, {name: array.copy() for name, array in start.arrays().items()}) for _ in range(20)]
        litter = [np.full(size, np.nan, dtype=np.float32) for size in sizes for _ in range(60)]
        expected = start.extend(feeds)
        for cache in (*caches[1:], caches[0].copy()):
            np.testing.assert_allclose(cache.extend(feeds), expected, rtol=1e-5, atol=1e-5)
        assert len(litter) == 60 * len(sizes)


def test_a_copy_goes_its_own_way_and_results_are_the_callers(exported: Exported) -> None:
    random = np.random.default_rng(8)
    with open_engine(exported("gpt2")[1], threads=1) as engine:
        cache = open_cache(engine, empty_cache(engine.inputs, 2))
        feeds = _prompt(random, 2, 6)
        prompt = cache.extend(feeds)
        kept, other = prompt.copy(), cache.copy()
        first = cache.extend(_next(feeds, np.array([5, 6])))
        cache.extend(_next(_next(feeds, np.array([5, 6])), np.array([7, 8])))
        np.testing.assert_array_equal(other.extend(_next(feeds, np.array([5, 6]))), first)
        np.testing.assert_array_equal(prompt, kept)
        arrays = other.arrays()
        before = {name: array.copy() for name, array in arrays.items()}
        for array in arrays.values():
            array[:] = 0
        np.testing.assert_array_equal(other.arrays()[next(iter(before))], before[next(iter(before))])


def test_what_does_not_fit_is_refused_and_changes_nothing(exported: Exported) -> None:
    random = np.random.default_rng(9)
    engine = open_engine(exported("gpt2")[1], threads=1)
    assert isinstance(engine, CachingEngine)
    past = empty_cache(engine.inputs, 2)
    with pytest.raises(EngineError, match="takes the inputs"):
        engine.cache(dict(list(past.items())[1:]))
    with pytest.raises(EngineError, match="must be an array of float32"):
        engine.cache({name: array.astype(np.float64) for name, array in past.items()})
    cache, feeds = engine.cache(past), _prompt(random, 2, 6)
    expected = engine.cache(past).extend(feeds)
    with pytest.raises(EngineError, match="takes the inputs"):
        cache.extend({"input_ids": feeds["input_ids"]})
    with pytest.raises(EngineError, match="failed to run"):
        cache.extend(_prompt(random, 3, 6))  # a row more than the cache has
    np.testing.assert_array_equal(cache.extend(feeds), expected)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        cache.extend(_next(feeds, np.array([5, 6])))


class _AsOnGpu:
    """The engine's inputs and cache, with the sessions that a GPU gets, on the CPU."""

    def __init__(self, engine: Engine, file: Path) -> None:
        self.inputs, self.opened = engine.inputs, list[Any]()
        self.sessions = FusedSessions(
            onnxruntime, file, self._open, device="cpu", inputs=engine.inputs, outputs=engine.outputs,
            max_length=engine.max_length,
        )  # fmt: skip

    def _open(self, model: Any, graphs: bool) -> Any:
        self.opened.append(model)
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def cache(self, past: dict[str, Array]) -> OrtCache:
        return OrtCache(onnxruntime, self.sessions.session_for, past, device="cpu", inputs=self.inputs, max_length=None)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_sessions_of_a_decoder(exported: Exported, kind: str) -> None:
    """GPT-2's attention is fused; of Llama only the head is left out where nobody asks for it."""
    file = exported(kind)[1] / "model.onnx"
    random = np.random.default_rng(10)
    with open_engine(file.parent, threads=1) as engine:
        tried = _AsOnGpu(engine, file)
        assert tried.sessions.fused == (2 if kind == "gpt2" else 0)
        for rows, tokens in ((1, 9), (3, 12)):  # without and with padding
            feeds, past = _prompt(random, rows, tokens), empty_cache(engine.inputs, rows)
            one, other = tried.cache(past), HostCache(engine, past)
            for _ in range(6):
                scores, expected = one.extend(feeds), other.extend(feeds)
                np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
                feeds = _next(feeds, expected.argmax(axis=-1))
        feeds = _prompt(random, 2, 7)
        session = tried.sessions.session_for(feeds)
        assert session.run(["logits"], feeds | empty_cache(engine.inputs, 2))[0].shape == (2, 1, 35)
        every = tried.sessions.run(feeds | empty_cache(engine.inputs, 2))["logits"]
        np.testing.assert_allclose(
            every, engine.infer(feeds | empty_cache(engine.inputs, 2))["logits"], rtol=1e-4, atol=1e-4
        )


def test_decoding_uses_it(exported: Exported) -> None:
    with open_engine(exported("llama")[1], threads=1) as engine:
        decoding = Decoding(engine, pad_id=0)
        decoding.join([[5, 6, 7], [8]])
        assert isinstance(decoding._cache, OrtCache)
        decoding.keep(np.array([False, True]))
        assert isinstance(decoding._cache, OrtCache)
