"""Rows to batches of token ids: the same order for the same seed, whatever was interrupted in between."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pst.data import Examples
from pst.errors import ModelError

CHUNK = 50
"""Batches that are sorted by length together: little padding, and still a random order."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokenized rows, unpadded."""

    columns: dict[str, list[list[int]]]
    """Model input name -> one list of ids a row."""
    labels: Tensor
    """(rows,) int64 classes or float32 values."""
    padding: dict[str, int]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.labels)

    def lengths(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """(rows,) tokens of each row."""
        return np.array([len(row) for row in self.columns["input_ids"]], dtype=np.int64)

    def weight(self, rows: Sequence[int]) -> int:
        """The loss of *rows* is a mean over this many targets: one a row."""
        return len(rows)

    def batch(self, rows: Sequence[int], *, length: int = 0) -> dict[str, Tensor]:
        """Model inputs of these *rows*, (B, T) int64 padded on the right to the longest, and ``labels`` (B,).

        T is at least *length*.
        """
        longest = max(length, *(len(self.columns["input_ids"][row]) for row in rows))
        batch = {}
        for name, column in self.columns.items():
            padded = torch.full((len(rows), longest), self.padding[name], dtype=torch.int64)
            for position, row in enumerate(rows):
                padded[position, : len(column[row])] = torch.tensor(column[row], dtype=torch.int64)
            batch[name] = padded
        return batch | {"labels": self.labels[torch.as_tensor(rows)]}


def encode(tokenizer: Any, examples: Examples, *, max_length: int) -> Encoded:
    """Tokenize *examples*, cutting rows to *max_length* tokens. Raises ModelError without a padding token."""
    if tokenizer.pad_token_id is None:
        raise ModelError("The tokenizer has no padding token; set pad_token in its tokenizer_config.json.")
    output = tokenizer(examples.first, examples.second, truncation=True, max_length=max_length, padding=False)
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
    columns = {name: output[name] for name in padding if name in output}
    return Encoded(columns=columns, labels=torch.as_tensor(examples.labels), padding=padding)


def batch_rows(
    lengths: "np.ndarray[Any, np.dtype[np.int64]]", *, batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, a pure function of its arguments: shuffled, with rows of like length together."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * CHUNK):
        chunk = order[start : start + batch_size * CHUNK]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size].tolist() for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def training_rows(
    lengths: "np.ndarray[Any, np.dtype[np.int64]]", *, batch_size: int, seed: int, first_step: int, steps: int
) -> Iterator[list[int]]:
    """The rows of steps *first_step* to *steps* - 1, epoch after epoch; *lengths* (rows,) is in tokens."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    for step in range(first_step, steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == first_step:
            batches = batch_rows(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        yield batches[position]
