"""The task's metric for a folder of any stage, in PyTorch or ONNX Runtime; of language models, perplexity."""

import dataclasses
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst import documents, metrics
from pst.data import DataSpec, Examples, align_labels, load_whole
from pst.errors import ConfigError
from pst.files import atomic_file
from pst.progress import progress
from serve import perplexity
from serve.classify import Classifier, softmax
from serve.describe import ModelFolder, describe, refuse_multi_label
from serve.engines import Array, Engine
from serve.generate import Generator


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What was measured, on what, and with what."""

    path: str
    task: str
    metric: str
    """Name of the task's headline metric, a key of metrics."""
    metrics: dict[str, float]
    rows: int
    source: str
    """The data as a person reads it."""
    fingerprint: str
    """SHA-256 of the data's content."""
    engine: str
    max_length: int
    batch_size: int
    seconds: float
    targets: int | None = None
    """Tokens that a language model's loss is a mean over."""

    @property
    def value(self) -> float:
        """The headline metric's value."""
        return self.metrics[self.metric]

    def to_json(self) -> dict[str, Any]:
        """Every field, and the headline's value."""
        return {**dataclasses.asdict(self), "value": self.value}

    def render(self) -> str:
        """A small table for a terminal, without colour."""
        from rich.console import Console
        from rich.table import Table

        table = Table("metric", "value")
        ordered = [self.metric, *(name for name in self.metrics if name != self.metric)]
        for name in ordered:
            table.add_row(name, f"{self.metrics[name]:.4f}")
        stream = io.StringIO()
        console = Console(file=stream, width=100, highlight=False)
        console.print(f"{self.path} on {self.source}", markup=False, soft_wrap=True)
        console.print(table)
        counted = f"{self.rows} rows" if self.targets is None else f"{self.targets} tokens of {self.rows} documents"
        console.print(f"{counted}, {self.engine}, {self.max_length} tokens at most, {self.seconds:.1f} s")
        return stream.getvalue().rstrip("\n")


class DataSet:
    """What a DataSpec names, read at the first use and once, however many models are measured on it."""

    def __init__(self, spec: DataSpec) -> None:
        self.spec = spec
        self._examples: Examples | None = None
        self._documents: documents.Documents | None = None

    def examples(self) -> Examples:
        """For classifiers and regressors. Raises DataError."""
        if self._examples is None:
            self._examples = load_whole(self.spec)
        return self._examples

    def documents(self) -> documents.Documents:
        """For language models. Raises DataError."""
        if self._documents is None:
            self._documents = documents.load_whole(self.spec)
        return self._documents


def run(classifier: Classifier, examples: Examples, *, batch_size: int) -> Array:
    """Logits of every example in the examples' order, (rows, labels) float32; batches hold texts of like length."""
    tokens = classifier.encoder.tokenize(examples.first, examples.second)
    order = sorted(range(len(tokens)), key=lambda index: (-len(tokens[index]), index))
    result: Array | None = None
    with progress("evaluate", len(tokens)) as advance:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            logits = classifier.logits([tokens[index] for index in batch])
            if result is None:
                result = np.empty((len(tokens), *logits.shape[1:]), dtype=logits.dtype)
            result[batch] = logits
            advance(len(batch))
    assert result is not None, "load_whole never returns an empty data set"
    return result


def evaluate(
    path: Path,
    data: DataSpec | DataSet,
    *,
    engine: str | Engine = "auto",
    batch_size: int = 32,
    predictions: Path | None = None,
    threads: int = 0,
) -> EvalResult:
    """Measure a run, model or artifact folder on all rows of a file, or on a folder's or hub id's validation split.

    *data*: where several models are measured on one, a DataSet, which is read once.
    *engine*: a name, or one that is open already and stays so.
    *predictions*: also write one JSON line per row, in the data's order: ``{"label", "prediction", "scores"}``, with
    class numbers and softmax scores, or the value and no scores where the task is regression.
    A language model is measured on documents (pst/documents.py) by its perplexity of them (serve/perplexity.py).

    Raises DataError, ModelError, ArtifactError, EngineError or ConfigError.
    """
    data = data if isinstance(data, DataSet) else DataSet(data)
    if batch_size < 1:
        raise ConfigError(f"A batch of {batch_size} rows holds nothing; give --batch-size 1 or more.")
    for source in (data.spec.data, data.spec.validation):
        if predictions is not None and source and os.path.realpath(source) == os.path.realpath(predictions):
            raise ConfigError(f"--predictions would replace the data in {source}; name another file.")
    if path.exists() and describe(path).task == "text_generation":
        if predictions is not None:
            raise ConfigError("--predictions writes the answers of classifiers and regressors; leave it out here.")
        return _evaluate_language_model(path, data, engine=engine, batch_size=batch_size, threads=threads)
    examples = data.examples()
    with Classifier(path, engine=engine, threads=threads, verify=True) as classifier:
        folder = classifier.folder
        examples = _aligned(examples, folder, path)
        start = time.perf_counter()
        logits = run(classifier, examples, batch_size=batch_size)
        seconds = time.perf_counter() - start
        engine_name = classifier.engine.name
    answers = logits[:, 0] if folder.task == "regression" else logits.argmax(axis=1)
    headline = metrics.for_data(data.spec.data, folder.task, folder.num_labels)
    result = EvalResult(
        path=str(path),
        task=folder.task,
        metric=headline,
        metrics=metrics.compute(folder.task, answers, examples.labels),
        rows=len(examples),
        source=examples.source,
        fingerprint=examples.fingerprint,
        engine=engine_name,
        max_length=folder.max_length,
        batch_size=batch_size,
        seconds=seconds,
    )
    if predictions is not None:
        _write_predictions(predictions, examples.labels, answers, logits, task=folder.task)
    return result


def check_data(path: Path, data: DataSet) -> None:
    """Raise what evaluate would raise about *data* for the folder *path*, before anything is opened."""
    folder = describe(path)
    if folder.task == "text_generation":
        data.documents()
    else:
        refuse_multi_label(folder)
        _aligned(data.examples(), folder, path)


def _aligned(examples: Examples, folder: ModelFolder, path: Path) -> Examples:
    return align_labels(
        examples, label2id=folder.label2id, num_labels=folder.num_labels, task=folder.task, where=str(path)
    )


def _evaluate_language_model(
    path: Path, data: DataSet, *, engine: str | Engine, batch_size: int, threads: int
) -> EvalResult:
    text = data.documents()
    with Generator(path, engine=engine, threads=threads, verify=True) as model:
        blocks = perplexity.blocks_of(model, text)
        start = time.perf_counter()
        loss, targets = perplexity.token_loss(model, blocks, batch_size=batch_size)
        seconds = time.perf_counter() - start
        engine_name = model.engine.name
    return EvalResult(
        path=str(path),
        task="text_generation",
        metric="perplexity",
        metrics={"perplexity": perplexity.perplexity(loss), "loss": loss},
        rows=len(text),
        source=text.source,
        fingerprint=text.fingerprint,
        engine=engine_name,
        max_length=len(blocks[0]),
        batch_size=batch_size,
        seconds=seconds,
        targets=targets,
    )


def _write_predictions(path: Path, labels: Array, answers: Array, logits: Array, *, task: str) -> None:
    scores = [[] for _ in answers] if task == "regression" else softmax(logits).tolist()
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for label, answer, row in zip(labels.tolist(), answers.tolist(), scores, strict=True):
            file.write(json.dumps({"label": label, "prediction": answer, "scores": row}) + "\n")
