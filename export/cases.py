"""The inputs on which an exported graph is compared with PyTorch: random tokens in several shapes, and text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.cache import PAST, cache_names
from export.source import Source

Array = np.ndarray[Any, Any]
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
CALIBRATION_ROWS = 128  # that int8 is calibrated on, spread evenly over the examples
_ROWS = 128  # real inputs compared, spread evenly over the examples
_BATCH = 16
# Of a decoder, which answers each token with a score for each word of its vocabulary:
_CACHED_LENGTH = 128  # longest row, but for one of up to _CACHED_LONGEST
_CACHED_LONGEST = 1024
_CACHED_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs to compare on: each array int64, (batch_size, sequence_length)."""

    name: str
    feeds: dict[str, Array]
    random: bool = False
    """Whether the tokens are drawn, which makes no text."""

    @property
    def shape(self) -> tuple[int, int]:
        """(batch_size, sequence_length)."""
        batch, length = self.feeds["input_ids"].shape
        return batch, length


def all_cases(source: Source, examples: Any) -> list[Case]:
    """Random inputs of nine shapes and text; *examples* is a pst.data.Examples, or None for built-in sentences.

    A decoder's rows are padded on the left, others on the right; its feeds are the tokens and their mask alone.
    """
    return [*_random_cases(source), *(_texts(source, examples) if source.head.cached else _rows(source, examples))]


def _random_cases(source: Source) -> Iterator[Case]:
    """Random tokens in every shape; all rows but the first padded to a random length."""
    random = np.random.default_rng(0)
    vocabulary = int(source.model.config.vocab_size)
    most = min(source.max_length, _CACHED_LENGTH) if source.head.cached else source.max_length
    shapes = [(batch, length) for batch in BATCHES for length in (*(short for short in LENGTHS if short < most), most)]
    if most < min(source.max_length, _CACHED_LONGEST):
        shapes.append((1, min(source.max_length, _CACHED_LONGEST)))
    for batch, length in shapes:
        lengths = random.integers(1, length + 1, size=batch)
        lengths[0] = length
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        if source.head.cached:
            mask = mask[:, ::-1].copy()
        ids = np.where(mask == 1, random.integers(0, vocabulary, (batch, length)), source.pad_token_id)
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask}
        if "token_type_ids" in source.input_names:
            segments = random.integers(0, source.model.config.type_vocab_size, (batch, length))
            feeds["token_type_ids"] = (segments * mask).astype(np.int64)
        yield Case(name=f"random {batch}x{length}", feeds=feeds, random=True)


def calibration_rows(source: Source, examples: Any) -> Iterator[dict[str, Array]]:
    """The graph's inputs for up to CALIBRATION_ROWS rows of *examples*, one by one and without padding.

    A decoder reads each as a prompt, with an empty cache.
    """
    for case in (_texts if source.head.cached else _rows)(source, examples, rows=CALIBRATION_ROWS, batch=1):
        feeds = dict(case.feeds)
        if source.head.cached:
            feeds["position_ids"] = np.arange(case.shape[1], dtype=np.int64)[None]
            cache = [tensor.numpy() for layer in source.cache for tensor in layer.empty(1)]
            feeds |= dict(zip(cache_names(PAST, len(source.cache)), cache, strict=True))
        yield feeds


def _pairs(examples: Any, *, rows: int) -> tuple[str, Sequence[str], Sequence[str] | None]:
    """What to call the texts, the first ones, and the second ones where the rows have two."""
    if examples is None:
        return "built-in text", SENTENCES, None
    chosen = np.unique(np.linspace(0, len(examples) - 1, min(rows, len(examples))).astype(np.int64))
    first = [examples.first[index] for index in chosen]
    return "real", first, [examples.second[index] for index in chosen] if examples.second is not None else None


def _rows(source: Source, examples: Any, *, rows: int = _ROWS, batch: int = _BATCH) -> Iterator[Case]:
    name, first, second = _pairs(examples, rows=rows)
    for start in range(0, len(first), batch):
        part = slice(start, start + batch)
        encoded = source.tokenizer(
            list(first[part]), list(second[part]) if second is not None else None,
            truncation=True, padding=True, max_length=source.max_length, return_tensors="np",
        )  # fmt: skip
        shape = encoded["input_ids"].shape
        feeds = {key: np.asarray(encoded.get(key, np.zeros(shape)), dtype=np.int64) for key in source.input_names}
        yield Case(name=name, feeds=feeds)


def _texts(source: Source, examples: Any, *, rows: int = _CACHED_ROWS, batch: int = _BATCH) -> Iterator[Case]:
    """For a decoder: the tokens of the first text, and of the second after an end of text, padded on the left."""
    name, first, second = _pairs(examples, rows=rows)
    most, end = min(source.max_length, _CACHED_LENGTH), source.tokenizer.eos_token_id
    tokens: list[list[int]] = source.tokenizer(list(first), truncation=True, max_length=most)["input_ids"]
    if second is not None:
        answers = source.tokenizer(list(second), truncation=True, max_length=most)["input_ids"]
        tokens = [
            [*row, *([] if end is None else [end]), *answer][:most] for row, answer in zip(tokens, answers, strict=True)
        ]
    tokens = [row for row in tokens if row]
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        longest = max(map(len, part))
        ids = np.array([[source.pad_token_id] * (longest - len(row)) + row for row in part], dtype=np.int64)
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in part], dtype=np.int64)
        yield Case(name=name, feeds={"input_ids": ids, "attention_mask": mask})
