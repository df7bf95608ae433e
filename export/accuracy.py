"""The task's metric of a model in PyTorch and of its artifact, on the same labelled rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from export.manifest import Accuracy
from export.source import Source
from pst import metrics
from pst.data import Examples, align_labels
from pst.progress import progress

Array = np.ndarray[Any, Any]
_BATCH = 32
_TASKS = ("classification", "regression")


def has_metric(source: Source, examples: Any) -> bool:
    """Whether *examples* carry labels, one a text, and the task of *source* has a metric for them."""
    several = source.model.config.problem_type == "multi_label_classification"
    return isinstance(examples, Examples) and source.task in _TASKS and not several


def measure_accuracy(source: Source, session: Any, examples: Examples, *, data: str) -> Accuracy:
    """Both metrics on all of *examples*; *data* is what they were called, which names GLUE's own metrics.

    *session* is the artifact's. Raises DataError where the labels are not the model's.
    """
    label2id = {name: number for number, name in enumerate(source.labels)}
    count = max(len(source.labels), 1)
    examples = align_labels(examples, label2id=label2id, num_labels=count, task=source.task, where=str(source.folder))
    texts = (examples.first,) if examples.second is None else (examples.first, examples.second)
    encoded = source.tokenizer(*texts, truncation=True, max_length=source.max_length)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    order = np.argsort(-lengths, kind="stable")
    logits: dict[str, dict[int, Array]] = {"pytorch": {}, "artifact": {}}
    runs: dict[str, Callable[[dict[str, Array]], Array]] = {
        "pytorch": lambda feeds: _in_pytorch(source, feeds),
        "artifact": lambda feeds: np.asarray(session.run(["logits"], feeds)[0]),
    }
    with progress("accuracy", len(order)) as advance:
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH].tolist()
            part = {name: [values[row] for row in rows] for name, values in encoded.items()}
            padded = source.tokenizer.pad(part, return_tensors="np")
            shape = padded["input_ids"].shape
            feeds = {name: np.asarray(padded.get(name, np.zeros(shape)), dtype=np.int64) for name in source.input_names}
            for name, run in runs.items():
                logits[name] |= dict(zip(rows, run(feeds), strict=True))
            advance(len(rows))
    metric = metrics.for_data(data, source.task, count)
    found = {name: _score(source, by_row, examples, metric) for name, by_row in logits.items()}
    return Accuracy(
        metric=metric, pytorch=found["pytorch"], artifact=found["artifact"], rows=len(examples),
        fingerprint=examples.fingerprint,
    )  # fmt: skip


def _in_pytorch(source: Source, feeds: dict[str, Array]) -> Array:
    with torch.inference_mode():
        output = source.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    logits: Array = output.logits.numpy()
    return logits


def _score(source: Source, by_row: dict[int, Array], examples: Examples, metric: str) -> float:
    logits = np.stack([by_row[row] for row in range(len(examples))])
    answers = logits[:, 0] if source.task == "regression" else logits.argmax(-1)
    return metrics.compute(source.task, answers, examples.labels)[metric]
