"""Buffers that stay with their shape, and what happens where a CUDA graph cannot be; on the CPU, with its provider."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serve.engines import Array, TensorSpec, open_engine
from serve.engines import _onnxruntime_device as module
from serve.engines._onnxruntime_device import DeviceSession
from serve.engines._sizes import shape_of, sizes_of


class _Failing:
    """A session whose first runs with a CUDA graph fail, as where a node cannot be recorded."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : operation not permitted when stream is capturing")
        self._session.run_with_iobinding(binding, options)


def _feeds(rows: int, tokens: int, *, seed: int = 0) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(5, 30, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _opened(folder: Path, *, graphs: bool, fault: str = "", shapes: Any = ()) -> tuple[Any, DeviceSession, list[bool]]:
    """The engine to compare with, the session under test, and with which graphs it was opened."""
    engine, asked = open_engine(folder, engine="onnxruntime", threads=1), list[bool]()

    def open_session(wanted: bool) -> Any:
        asked.append(wanted)
        if wanted and fault == "open":
            raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : the model has memcpy nodes")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return _Failing(session) if wanted and fault == "run" else session

    made = DeviceSession(
        onnxruntime, open_session, device="cpu", inputs=engine.inputs, outputs=engine.outputs, graphs=graphs,
        shapes=shapes,
    )  # fmt: skip
    return engine, made, asked


def _same(engine: Any, session: DeviceSession, feeds: dict[str, Array]) -> None:
    np.testing.assert_array_equal(session.run(feeds)["logits"], engine.infer(feeds)["logits"])


def test_buffers_of_many_shapes(bert_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    engine, session, _ = _opened(bert_artifact, graphs=False)
    for seed in range(3):
        for shape in ((1, 4), (2, 9), (3, 3), (1, 5), (2, 4)):
            _same(engine, session, _feeds(*shape, seed=seed))
    assert len(session._bound) == 3
    assert not session._recorded


def test_what_was_given_is_not_written_to(bert_artifact: Path) -> None:
    engine, session, _ = _opened(bert_artifact, graphs=False)
    first, second = _feeds(2, 6, seed=1), _feeds(2, 6, seed=2)
    kept = {name: array.copy() for name, array in first.items()}
    answer = session.run(first)["logits"]
    before = answer.copy()
    _same(engine, session, second)
    np.testing.assert_array_equal(answer, before)
    for name, array in kept.items():
        np.testing.assert_array_equal(first[name], array)


def test_a_shape_is_recorded_when_it_comes_again_or_was_announced(
    bert_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    engine, session, asked = _opened(bert_artifact, graphs=True, shapes=((3, 5),))
    for shape, recorded in (((1, 4), 0), ((3, 5), 1), ((1, 4), 2), ((2, 2), 2), ((2, 2), 2), ((1, 4), 2)):
        _same(engine, session, _feeds(*shape))
        assert len(session._recorded) == recorded, shape
    assert asked == [True]
    identifiers = [bound.options.get_run_config_entry("gpu_graph_id") for bound in session._recorded.values()]
    assert identifiers == ["0", "1"]
    assert {bound.options.get_run_config_entry("gpu_graph_id") for bound in session._bound.values()} == {"-1"}


@pytest.mark.parametrize(("fault", "opened"), [("open", [True, False]), ("run", [True, False])])
def test_without_a_graph_it_goes_on_and_says_so(
    bert_artifact: Path, capsys: pytest.CaptureFixture[str], fault: str, opened: list[bool]
) -> None:
    engine, session, asked = _opened(bert_artifact, graphs=True, fault=fault)
    for seed in range(4):
        _same(engine, session, _feeds(2, 6, seed=seed))
    assert asked == opened
    assert not session.graphs
    said = capsys.readouterr().err
    assert said.count("records no CUDA graph of this model") == 1
    assert ("memcpy nodes" if fault == "open" else "stream is capturing") in said


def test_an_error_of_the_caller_stays_one(bert_artifact: Path) -> None:
    engine, session, _ = _opened(bert_artifact, graphs=False)
    feeds = _feeds(2, 6)
    feeds["input_ids"][0, 0] = 10_000  # no such token
    with pytest.raises(Exception, match="indices element out of data bounds"):
        session.run(feeds)
    _same(engine, session, _feeds(2, 6))


def test_shapes_from_symbols() -> None:
    inputs = {
        "ids": TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens")),
        "past": TensorSpec(name="past", dtype="float32", shape=("batch", 2, "past", 8)),
    }
    sizes = sizes_of(inputs, {"ids": (3, 4), "past": (3, 2, 5, 8)})
    assert sizes == {"batch": 3, "tokens": 4, "past": 5}
    spec = TensorSpec(name="present", dtype="float32", shape=("batch", 2, "past + tokens", 8))
    assert shape_of(spec, sizes) == [3, 2, 9, 8]
    assert shape_of(TensorSpec(name="odd", dtype="float32", shape=("batch", "other")), sizes) is None
