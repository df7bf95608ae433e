"""The metrics against scikit-learn and scipy."""

import importlib

import numpy as np
import pytest

from pst.metrics import compute, for_data

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_classification_equals_scikit_learn(seed: int, classes: int) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, size=50 + seed)
    predictions = np.where(random.random(labels.size) < 0.6, labels, random.integers(0, classes, size=labels.size))
    scores = compute("classification", predictions, labels)
    assert scores["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predictions), abs=1e-12)
    assert scores["matthews"] == pytest.approx(oracle.matthews_corrcoef(labels, predictions), abs=1e-12)
    assert ("f1" in scores) == (classes == 2)
    if classes == 2:
        assert scores["f1"] == pytest.approx(oracle.f1_score(labels, predictions), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_regression_equals_scipy(seed: int) -> None:
    pytest.importorskip("scipy")
    oracle = importlib.import_module("scipy.stats")
    random = np.random.default_rng(seed)
    labels = np.round(random.uniform(0, 5, size=60), 1)  # ties
    predictions = (labels + random.normal(size=60)).round(1 + seed % 2).astype(np.float32)
    scores = compute("regression", predictions, labels)
    assert scores["pearson"] == pytest.approx(oracle.pearsonr(predictions.astype(np.float64), labels)[0], abs=1e-9)
    assert scores["spearman"] == pytest.approx(oracle.spearmanr(predictions, labels)[0], abs=1e-9)
    assert scores["mse"] == pytest.approx(np.mean((predictions - labels) ** 2), rel=1e-6)


def test_known_values_by_hand() -> None:
    scores = compute("classification", [1, 1, 0, 0, 1], [1, 0, 0, 1, 1])  # TP 2, FP 1, FN 1, TN 1
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(4 / 6)
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert compute("regression", [1, 2, 3], [2, 4, 6]) == pytest.approx({"pearson": 1, "spearman": 1, "mse": 14 / 3})


def test_undefined_values_are_zero_without_a_warning() -> None:
    assert compute("classification", [1, 1, 1], [1, 0, 1])["matthews"] == 0.0
    assert compute("classification", [0, 0], [0, 0]) == {"accuracy": 1.0, "matthews": 0.0, "f1": 0.0}
    assert compute("regression", [0.1, 0.1, 0.1], [1, 2, 3])["pearson"] == 0.0


def test_arrays_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="must be one equal, non-empty row"):
        compute("classification", [1, 0], [1])
    with pytest.raises(ValueError, match="must be one equal, non-empty row"):
        compute("regression", [], [])
    with pytest.raises(ValueError, match="task_name is 'ranking'"):
        compute("ranking", [1], [1])


@pytest.mark.parametrize(
    ("data", "task", "num_labels", "metric"),
    [
        ("glue/cola", "classification", 2, "matthews"),
        ("glue/mrpc", "classification", 2, "f1"),
        ("glue/qqp", "classification", 2, "f1"),
        ("glue/sst2", "classification", 2, "accuracy"),
        ("glue/stsb", "regression", 1, "pearson"),
        ("data/CoLA/validation.jsonl", "classification", 2, "matthews"),
        ("mrpc.csv", "classification", 2, "f1"),
        ("mrpc.csv", "classification", 3, "accuracy"),
        ("chocolate/reviews.csv", "classification", 2, "accuracy"),
        ("sts-b", "classification", 6, "accuracy"),
        ("prices.csv", "regression", 1, "pearson"),
    ],
)
def test_the_headline_metric(data: str, task: str, num_labels: int, metric: str) -> None:
    assert for_data(data, task, num_labels) == metric
