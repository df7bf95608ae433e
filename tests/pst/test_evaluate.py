"""Evaluation during training: the model's own logits, in the order of the rows, and no trace left behind."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from pst import data, metrics
from pst.batches import Encoded, encode
from pst.evaluate import evaluate, predict
from pst.loading import load_classifier, load_config, load_tokenizer
from pst.sparsify import merge_, set_sparsity_, sparsify_

CPU = torch.device("cpu")


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def ready(request: pytest.FixtureRequest, reviews_file: Path) -> tuple[Any, Encoded]:
    """A model with masks at 60%, and 64 encoded rows of unequal length."""
    source = str(request.getfixturevalue(request.param))
    examples = data.load_whole(data.DataSpec(data=str(reviews_file)))
    model, examples, _ = load_classifier(source, load_config(source), examples, examples)
    sparsify_(model)
    set_sparsity_(model, 0.6)
    return model, encode(load_tokenizer(source), examples, max_length=64)


def test_logits_are_those_of_each_row_alone(ready: tuple[Any, Encoded]) -> None:
    model, encoded = ready
    logits = predict(model, encoded, batch_size=7, device=CPU)
    assert logits.shape == (64, 2)
    assert logits.dtype == np.float32
    model.eval()
    with torch.no_grad():
        for row in range(64):
            alone = model(**{name: value for name, value in encoded.batch([row]).items() if name != "labels"}).logits
            np.testing.assert_allclose(logits[row], alone[0].numpy(), rtol=1e-4, atol=1e-5)


def test_metrics_of_those_logits(ready: tuple[Any, Encoded]) -> None:
    model, encoded = ready
    logits = predict(model, encoded, batch_size=64, device=CPU)
    expected = metrics.compute("classification", logits.argmax(-1), encoded.labels.numpy())
    assert evaluate(model, encoded, task="classification", batch_size=64, device=CPU) == expected
    scores = Encoded(columns=encoded.columns, labels=encoded.labels.float(), padding=encoded.padding)
    expected = metrics.compute("regression", logits[:, 0], encoded.labels.numpy())
    assert evaluate(model, scores, task="regression", batch_size=64, device=CPU) == expected


def test_merged_and_masked_models_agree_bit_for_bit(ready: tuple[Any, Encoded]) -> None:
    model, encoded = ready
    masked = predict(model, encoded, batch_size=16, device=CPU)
    merge_(model)
    assert np.array_equal(predict(model, encoded, batch_size=16, device=CPU), masked)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool, ready: tuple[Any, Encoded]) -> None:
    model, encoded = ready
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    evaluate(model, encoded, task="classification", batch_size=16, device=CPU)
    assert model.training == training
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_training_goes_on_after_it(ready: tuple[Any, Encoded]) -> None:
    """No cached weight made for inference is left to stand in the way of a gradient."""
    model, encoded = ready
    evaluate(model, encoded, task="classification", batch_size=16, device=CPU)
    assert not parametrize._cache
    model.train()
    model(**encoded.batch([0, 1, 2])).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith((".V", ".B"))]
    assert gradients
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)
