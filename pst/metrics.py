"""What a model scores on labelled rows, in numpy alone.

    classification    accuracy = share of equal labels
                      f1       = 2 TP / (2 TP + FP + FN), for two classes, class 1 being the positive one
                      matthews = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))
                                 s rows, c of them right, p_k predicted as k, t_k labelled k (Gorodkin 2004)
    regression        pearson  = correlation of the values; spearman = of their ranks, ties sharing the mean rank
                      mse      = mean squared error

Fractions lie in [0, 1], correlations in [-1, 1]. A value whose denominator is 0 is 0.
"""

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

GLUE_METRICS = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}


def for_data(data: str, task: str, num_labels: int) -> str:
    """The name of the headline metric for data called *data*: GLUE's own by name, else accuracy or pearson.

    A name counts wherever it is a part of the path or hub id: "glue/cola", "data/MRPC/train.jsonl", "sts-b.csv".
    """
    if task == "regression":
        return "pearson"
    for part in reversed(re.split(r"[/\\\\.]", data.lower())):
        metric = GLUE_METRICS.get(re.sub(r"[-_ ]", "", part))
        if metric is not None and metric != "pearson" and (metric != "f1" or num_labels == 2):
            return metric
    return "accuracy"


def compute(task_name: str, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Every metric of the task ("classification" or "regression") for two arrays of shape (rows,).

    *predictions* are class numbers or scores, not logits. f1 is there where neither side goes beyond class 1.
    """
    if task_name not in {"classification", "regression"}:
        raise ValueError(f"task_name is {task_name!r}, not 'classification' or 'regression'")
    predicted, actual = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != actual.shape or not predicted.size:
        raise ValueError(f"predictions {predicted.shape} and labels {actual.shape} must be one equal, non-empty row")
    if task_name == "regression":
        x, y = predicted.astype(np.float64), actual.astype(np.float64)
        return {
            "pearson": _pearson(x, y),
            "spearman": _pearson(_ranks(x), _ranks(y)),
            "mse": float(np.mean((x - y) ** 2)),
        }
    scores = {"accuracy": float(np.mean(predicted == actual)), "matthews": _matthews(predicted, actual)}
    if max(predicted.max(), actual.max()) <= 1:
        scores["f1"] = _f1(predicted, actual)
    return scores


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def _f1(predicted: NDArray[np.generic], actual: NDArray[np.generic]) -> float:
    hits = int(np.sum((predicted == 1) & (actual == 1)))
    return _ratio(2.0 * hits, float(np.sum(predicted == 1) + np.sum(actual == 1)))


def _matthews(predicted: NDArray[np.generic], actual: NDArray[np.generic]) -> float:
    classes = np.union1d(predicted, actual)
    p = np.array([np.sum(predicted == k) for k in classes], dtype=np.float64)  # (classes,)
    t = np.array([np.sum(actual == k) for k in classes], dtype=np.float64)  # (classes,)
    s, c = float(len(actual)), float(np.sum(predicted == actual))
    return _ratio(c * s - float(p @ t), float(np.sqrt((s * s - p @ p) * (s * s - t @ t))))


def _pearson(x: Floats, y: Floats) -> float:
    if np.all(x == x[0]) or np.all(y == y[0]):  # a mean that is not exact would leave noise instead of 0
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    correlation = _ratio(float(x @ y), float(np.linalg.norm(x) * np.linalg.norm(y)))
    return min(1.0, max(-1.0, correlation))


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean: Floats = ends - (counts - 1) / 2.0
    return mean[inverse]
