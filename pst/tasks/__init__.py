"""What a model learns: one file a task, found by its name.

Each file defines ``prepare(config, *, examples=None) -> Prepared``: it loads rows, tokenizer and model, tokenizes, and
says how the result is measured. The loop in pst/train.py knows nothing else of a task.
"""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pst.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from pst.distributed import Processes


class Rows(Protocol):
    """Tokenized rows, unpadded."""

    def __len__(self) -> int:
        """The number of rows."""

    def lengths(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """(rows,) tokens of each row; rows of like length share a batch."""

    def batch(self, rows: "list[int]", *, length: int = 0) -> "dict[str, Tensor]":
        """The model's inputs of these *rows*, padded on the right to the longest or to *length*, and ``labels``."""

    def weight(self, rows: "list[int]") -> int:
        """Over how many targets the loss of these *rows* is a mean: rows of a classifier, tokens of a language model.

        Losses of parts of a batch add up to the loss of the whole when each is weighted by its share of this.
        """


class Measure(Protocol):
    """How well a model does on the validation rows."""

    def __call__(
        self, model: "nn.Module", *, batch_size: int, device: "torch.device", processes: "Processes", final: bool = True
    ) -> dict[str, float]:
        """Metrics by name, the same in every process, each of which does its share. Changes nothing in the model.

        Before the end of a run, without *final*, what takes long may be left out.
        """


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model with its tokenizer and rows, ready for the loop."""

    model: "nn.Module"
    tokenizer: Any
    max_length: int
    train: Rows
    evaluate: Measure
    task: str
    """As stored in sparsity.json: classification, regression, language_modeling, data_to_text."""
    fingerprints: dict[str, str]
    """What the rows were, by name: a run can be resumed on the same alone."""
    data: dict[str, Any]
    """The rows in words and numbers, for sparsity.json."""


def names() -> list[str]:
    """The tasks that exist, by their files."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__))


def prepare(config: TrainConfig, **options: Any) -> Prepared:
    """Everything that training *config* needs; *options* go to the task's own ``prepare``.

    Raises DataError and ModelError for what the task cannot use.
    """
    name = "classification" if config.task == "auto" else config.task
    prepared: Prepared = importlib.import_module(f"{__name__}.{name}").prepare(config, **options)
    return prepared
