"""Batches that are filled up to the shapes that an engine has kernels of their own for."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve.holder
from serve.classify import WARM_UPS, Classifier
from serve.engines import Array, Shapes, open_engine
from serve.padding import filled_shape

PREPARED = ((1, 8), (1, 16), (4, 16))


@pytest.mark.parametrize(
    ("shape", "filled"),
    [
        ((1, 8), (1, 8)), ((1, 5), (1, 8)), ((1, 4), (1, 8)), ((1, 3), (1, 3)), ((1, 9), (1, 16)),
        ((1, 17), (1, 17)), ((2, 15), (2, 15)), ((2, 16), (4, 16)), ((3, 11), (4, 16)), ((5, 16), (5, 16)),
    ],
)  # fmt: skip
def test_the_smallest_that_holds_it_and_is_not_twice_as_large(shape: tuple[int, int], filled: tuple[int, int]) -> None:
    assert filled_shape(shape, PREPARED) == filled
    assert filled_shape(shape, PREPARED[::-1]) == filled
    assert filled_shape(shape, ()) == shape


class Recorded:
    """ONNX Runtime, which says that it has kernels of their own for some shapes, and what it was given."""

    def __init__(self, path: Path, prepared: tuple[tuple[int, int], ...]) -> None:
        self._engine = open_engine(path, engine="onnxruntime-cpu", threads=1)
        self.prepared_shapes = prepared
        self.given: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self.given.append(feeds["input_ids"].shape)
        return self._engine.infer(feeds)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Engines that a Classifier opens."""
    found: list[Recorded] = []

    def open_recorded(path: Path, *, shapes: Shapes, **_: Any) -> Recorded:
        found.append(Recorded(path, shapes.fixed))
        return found[-1]

    monkeypatch.setattr(serve.holder, "open_engine", open_recorded)
    return found


def test_answers_stay_the_same(bert_artifact: Path, opened: list[Recorded]) -> None:
    texts = ["a lovely film", "a dull and empty film", "the film"]
    with Classifier(bert_artifact) as plain, Classifier(bert_artifact, shapes=Shapes(fixed=((4, 8),))) as filled:
        for first, second in ((texts, None), (texts[:2], texts[1:])):
            rows = plain.encoder.tokenize(first, second)
            np.testing.assert_allclose(filled.logits(rows), plain.logits(rows), atol=1e-5)
        assert [answer.label for answer in filled.predict(texts)] == [answer.label for answer in plain.predict(texts)]
    assert {shape[0] for shape in opened[0].given} == {2, 3}
    assert (4, 8) in opened[1].given


def test_nothing_is_filled_up_without_a_padding_token_or_in_an_engine_of_somebody_else(
    gpt2_artifact: Path, bert_artifact: Path, opened: list[Recorded]
) -> None:
    with Classifier(bert_artifact, engine=Recorded(bert_artifact, ((4, 8),))) as given:  # type: ignore[arg-type]
        given.predict(["a lovely film"] * 3)
        assert given.engine.given[0][0] == 3  # type: ignore[attr-defined]
        given.engine.close()
    with Classifier(gpt2_artifact, shapes=Shapes(fixed=((4, 8),))) as model:
        model.encoder.pad_id = None
        model._prepared = model._prepared_of(model.engine)
        model.predict(["a lovely film"] * 3)
    assert opened[0].given[0][0] == 3


def test_padding_on_the_left_moves_no_text(bert_artifact: Path, opened: list[Recorded], tmp_path: Path) -> None:
    """BERT counts positions from the left, padding among them."""
    left = Path(shutil.copytree(bert_artifact, tmp_path / "left"))
    settings = json.loads((left / "tokenizer_config.json").read_text(encoding="utf-8"))
    (left / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}), encoding="utf-8")
    with Classifier(left) as plain, Classifier(left, shapes=Shapes(fixed=((1, 8),))) as filled:
        rows = plain.encoder.tokenize(["a lovely film"])
        assert len(rows[0]) < 8
        np.testing.assert_allclose(filled.logits(rows), plain.logits(rows), atol=1e-5)


def test_announced_shapes_are_warm(bert_artifact: Path, opened: list[Recorded]) -> None:
    with Classifier(bert_artifact, shapes=Shapes(fixed=((1, 2), (4, 16)))) as model:
        model.warm_up()
    assert opened[0].given[1:] == [(1, 2)] * WARM_UPS + [(4, 16)] * WARM_UPS


def test_a_cpu_that_prepares_for_no_shape_is_not_warmed_up_at_them(bert_artifact: Path) -> None:
    """A server of 128x384 on a CPU would be ready minutes later, and no faster."""
    shapes = Shapes(fixed=((1, 2), (4, 16)))
    with Classifier(bert_artifact, engine="onnxruntime-cpu", threads=1, shapes=shapes) as model:
        given: list[tuple[int, ...]] = []
        infer = model.engine.infer

        def watched(feeds: Mapping[str, Array]) -> dict[str, Array]:
            given.append(feeds["input_ids"].shape)
            return infer(feeds)

        model.engine.infer = watched  # type: ignore[method-assign]
        model.warm_up()
    assert len(given) == 1
