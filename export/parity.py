"""Proof that ONNX Runtime computes from an exported graph what PyTorch computes from the model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from export.manifest import Parity
from export.source import Source
from pst.errors import ArtifactError

Array = np.ndarray[Any, Any]
ATOL, RTOL = 1e-4, 1e-3
BATCHES = (1, 2, 5)
LENGTHS = (1, 7)  # and the model's max_length
SENTENCES = (
    "A film that is moving, honest and superbly acted.",
    "The plot is dull, and the ending is worse.",
    "It was not as bad as I had feared.",
    "Two hours that I will never get back!",
    "An odd little story about love, war and a very old bicycle, told with charm and without haste.",
    "Fine.",
)
"""Text for models that come without examples of their own."""
_ROWS = 128  # real inputs compared, spread evenly over the examples
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs to compare on: each array int64, (batch_size, sequence_length)."""

    name: str
    feeds: dict[str, Array]


def open_session(model: Path) -> Any:
    """An ONNX Runtime session on the CPU, as anyone would open it. ArtifactError where it refuses the file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no other base
        raise ArtifactError(f"ONNX Runtime refuses the exported graph: {str(error).splitlines()[0]}") from error


def check_parity(
    source: Source,
    session: Any,
    *,
    examples: Any = None,
    atol: float = ATOL,
    rtol: float = RTOL,
    advance: Callable[[float], None] = lambda fraction: None,
) -> Parity:
    """Compare PyTorch and *session* on random inputs of nine shapes and on text; *examples* is a pst.data.Examples.

    *advance* is told the fraction done after each comparison.

    Every output must be within atol + rtol * |PyTorch|; so a row can get another label only where its two highest
    scores are a tie within twice that. Raises ArtifactError beyond it, or where PyTorch's outputs are not finite.
    """
    absolute, relative, agree, rows = 0.0, 0.0, 0, 0
    reports: dict[str, dict[str, Any]] = {}
    cases = [*_random_cases(source), *_text_cases(source, examples)]
    for done, case in enumerate(cases, start=1):
        expected, actual = _torch(source, case), session.run(None, case.feeds)[0]
        same = _compare(source, case, expected, actual, atol=atol, rtol=rtol)
        difference, size = np.abs(actual - expected), np.abs(expected)
        worst = float(difference.max())
        absolute, agree, rows = max(absolute, worst), agree + int(same.sum()), rows + len(same)
        large = size > atol
        relative = max(relative, float((difference[large] / size[large]).max(initial=0.0)))
        batch, length = case.feeds["input_ids"].shape
        report = reports.setdefault(case.name, {"name": case.name, "rows": 0, "max_abs_error": 0.0})
        report["rows"] += batch
        report["max_abs_error"] = max(report["max_abs_error"], worst)
        report["batch_size"] = max(report.get("batch_size", 0), batch)
        report["sequence_length"] = max(report.get("sequence_length", 0), length)
        advance(done / len(cases))
    return Parity(
        max_abs_error=absolute, max_rel_error=relative,
        label_agreement=None if source.task == "regression" else agree / rows,
        tolerance={"atol": atol, "rtol": rtol}, cases=tuple(reports.values()),
    )  # fmt: skip


def _torch(source: Source, case: Case) -> Array:
    with torch.inference_mode():
        output = source.model(**{name: torch.from_numpy(array) for name, array in case.feeds.items()})
    logits: Array = output.logits.numpy()
    return logits


def _compare(source: Source, case: Case, expected: Array, actual: Array, *, atol: float, rtol: float) -> Array:
    """Whether each row's label is the same, (batch_size,). Raises ArtifactError beyond the tolerance."""
    where = f"on {case.name} inputs of shape {list(case.feeds['input_ids'].shape)}"
    if not np.isfinite(expected).all():
        raise ArtifactError(
            f"The model's own outputs {where} are not finite; its training diverged, so train it again."
        )
    if actual.shape != expected.shape:
        raise ArtifactError(f"The ONNX graph gives shape {actual.shape} {where}, PyTorch {expected.shape}.")
    difference, allowed = np.abs(actual - expected), atol + rtol * np.abs(expected)
    if not (difference <= allowed).all():  # also true of NaN
        raise ArtifactError(
            f"ONNX Runtime differs from PyTorch by {float(difference.max()):.3g} {where}, beyond the tolerance of "
            f"{atol:g} + {rtol:g} * |PyTorch|; nothing was written. Try another --opset, "
            "or allow more with --atol and --rtol."
        )
    if source.task == "regression":
        return np.ones(len(expected), dtype=bool)
    same: Array = actual.argmax(-1) == expected.argmax(-1)
    return same


def _random_cases(source: Source) -> Iterator[Case]:
    """Random tokens in every shape; all rows but the first padded on the right to a random length."""
    random = np.random.default_rng(0)
    vocabulary = int(source.model.config.vocab_size)
    for batch in BATCHES:
        for length in (*(length for length in LENGTHS if length < source.max_length), source.max_length):
            lengths = random.integers(1, length + 1, size=batch)
            lengths[0] = length
            mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
            ids = np.where(mask == 1, random.integers(0, vocabulary, (batch, length)), source.pad_token_id)
            feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask}
            if "token_type_ids" in source.input_names:
                segments = random.integers(0, source.model.config.type_vocab_size, (batch, length))
                feeds["token_type_ids"] = (segments * mask).astype(np.int64)
            yield Case(name=f"random {batch}x{length}", feeds=feeds)


def _text_cases(source: Source, examples: Any) -> Iterator[Case]:
    name = "built-in text" if examples is None else "real"
    first: Sequence[str] = SENTENCES
    second: Sequence[str] | None = None
    if examples is not None:
        chosen = np.unique(np.linspace(0, len(examples) - 1, min(_ROWS, len(examples))).astype(np.int64))
        first = [examples.first[index] for index in chosen]
        second = [examples.second[index] for index in chosen] if examples.second is not None else None
    for start in range(0, len(first), _BATCH):
        part = slice(start, start + _BATCH)
        encoded = source.tokenizer(
            list(first[part]), list(second[part]) if second is not None else None,
            truncation=True, padding=True, max_length=source.max_length, return_tensors="np",
        )  # fmt: skip
        shape = encoded["input_ids"].shape
        feeds = {name: np.asarray(encoded.get(name, np.zeros(shape)), dtype=np.int64) for name in source.input_names}
        yield Case(name=name, feeds=feeds)
