"""Shapes and inputs."""

from pathlib import Path

import numpy as np
import pytest

from pst.errors import ConfigError, ModelError
from serve.bench.workload import check_shapes, parse_shapes, random_workload, text_workload
from serve.text import TextEncoder


def test_parse_shapes() -> None:
    assert parse_shapes("1x32,8x128") == [(1, 32), (8, 128)]
    assert parse_shapes(" 1X32 , 1×32, 2x4") == [(1, 32), (2, 4)]


@pytest.mark.parametrize(
    "text", ["", "32", "1x", "x32", "1x32,", "ax32", "1x32x2", "-1x32", "0x32", "1x0", "1.5x2", "²x3"]
)
def test_bad_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="shape"):
        parse_shapes(text)


def test_random_workload_has_exactly_the_shape() -> None:
    workload = random_workload((3, 17), vocab_size=50)
    feeds = workload.select(0, ["input_ids", "attention_mask", "token_type_ids", "position_ids"])
    assert {value.shape for value in feeds.values()} == {(3, 17)}
    assert {value.dtype for value in feeds.values()} == {np.dtype(np.int64)}
    assert feeds["input_ids"].min() >= 0
    assert feeds["input_ids"].max() < 50
    assert feeds["attention_mask"].all()
    np.testing.assert_array_equal(feeds["position_ids"][2], np.arange(17))
    again = random_workload((3, 17), vocab_size=50)
    np.testing.assert_array_equal(again.feeds[0]["input_ids"], feeds["input_ids"])
    with pytest.raises(ModelError, match="pixel_values"):
        workload.select(0, ["pixel_values"])


def test_text_workload_takes_texts_in_turn(tiny_bert: Path) -> None:
    encoder = TextEncoder(tiny_bert, max_length=8)
    texts = ["film", "the film is a story", "a lovely scene"]
    workload = text_workload(encoder, texts, None, limit=2)
    assert len(workload.feeds) == 2
    assert workload.sequence is None
    rounds = [workload.select(index, ["input_ids"])["input_ids"] for index in range(4)]
    np.testing.assert_array_equal(rounds[0], rounds[2])
    assert rounds[0].shape[0] == 1
    assert rounds[0].shape != rounds[1].shape


def test_too_long_shapes() -> None:
    check_shapes([(1, 64)], {"a": 64, "b": None})
    with pytest.raises(ConfigError, match="1x65 is longer than a can read"):
        check_shapes([(1, 64), (1, 65)], {"a": 64})
