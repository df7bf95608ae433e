"""Drawing tokens, against transformers' own probabilities."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from pst.errors import ConfigError
from serve.sampling import Picker, Sampling, nucleus

LOGITS = np.random.default_rng(0).normal(0, 3, 200).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_p: float) -> None:
    scores: Any = torch.from_numpy(LOGITS.astype(np.float64))[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = nucleus(LOGITS, Sampling(temperature=temperature, top_p=top_p))
    np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), atol=1e-12)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.8, seed=3)
    picker, draws = Picker(sampling), 20_000
    counts = np.bincount([picker.pick(LOGITS) for _ in range(draws)], minlength=len(LOGITS))
    expected = nucleus(LOGITS, sampling)
    assert (counts[expected == 0] == 0).all()
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= 5 * spread).all()


def test_a_seed_repeats_and_no_temperature_is_greedy() -> None:
    first, second = (Picker(Sampling(temperature=1.0, seed=7)) for _ in range(2))
    assert [first.pick(LOGITS) for _ in range(50)] == [second.pick(LOGITS) for _ in range(50)]
    assert {Picker(Sampling(seed=seed)).pick(LOGITS) for seed in range(20)} == {int(LOGITS.argmax())}
    assert len({Picker(Sampling(temperature=1.0, seed=seed)).pick(LOGITS) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": -1.0}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0.0}, "top_p"),
     ({"top_p": 1.5}, "top_p"), ({"seed": -1}, "seed")],
)  # fmt: skip
def test_what_makes_no_sense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)
