"""What a model's last layers answer, and so what its graph gives: one file a head, found by its name.

Each file defines ``HEAD``. The class name in a folder's config.json says which one it has, unless ``--task`` does.

    file                    class name ends in             outputs (Optimum's names)
    classification          ForSequenceClassification      logits (batch_size, labels); one label alone is a regression
    token_classification    ForTokenClassification         logits (batch_size, sequence_length, labels)
    question_answering      ForQuestionAnswering           start_logits, end_logits (batch_size, sequence_length)
    feature_extraction      Model, that is no head         last_hidden_state (batch_size, sequence_length, width)
    text_generation         ForCausalLM, LMHeadModel       logits (batch_size, sequence_length, vocabulary), and the
                                                           key/value cache, in and out (export/cache.py)
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

from pst.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True)
class Head:
    """One kind of answer."""

    task: str
    """The file's name: what ``--task`` takes and export.json states."""
    auto_class: str
    """The class of transformers that loads such a model, AutoModel..."""
    endings: tuple[str, ...]
    """Of the class names in config.json that stand for this head."""
    outputs: tuple[str, ...]
    """Fields of the model's output that become outputs of the graph, under the same names."""
    labelled: bool = False
    """Whether config.json's id2label names the last axis of the outputs."""
    agrees_along: int | None = None
    """Axis of the outputs whose highest entry is the answer; None where the outputs are no scores."""
    cached: bool = False
    """Whether the graph takes and gives a key/value cache."""


def tasks() -> tuple[str, ...]:
    """The heads that exist, by their files."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__)))


def check_task(task: str) -> None:
    """Raise ConfigError for a name that is neither a head's nor "auto"."""
    if task != "auto" and task not in tasks():
        raise ConfigError(f"Unknown task {task!r}; use one of auto, {', '.join(tasks())}.")


def choose_head(architectures: Sequence[str], *, task: str, where: str) -> Head:
    """The head of a model whose config.json names *architectures*, or the one that *task* asks for.

    A folder that names no class is taken for a classifier. Raises ConfigError for an unknown *task*, and ModelError,
    naming *where*, for a class that no head stands for.
    """
    check_task(task)
    if task != "auto":
        return _load(task)
    if not architectures:
        return _load("classification")
    fits = [(len(ending), head) for head in map(_load, tasks()) for ending in head.endings
            if architectures[0].endswith(ending)]  # fmt: skip
    if not fits:
        raise ModelError(
            f"{where} is a {architectures[0]}, whose head cannot be exported; export its encoder with "
            f"--task feature_extraction, or train one of the heads {', '.join(tasks())}."
        )
    return max(fits, key=lambda fit: fit[0])[1]


def _load(task: str) -> Head:
    head: Head = importlib.import_module(f"{__name__}.{task}").HEAD
    return head
