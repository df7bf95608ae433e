"""Text in, label and score out: a model folder, its tokenizer and an engine put together.

Evaluation and the server both stand on this. Scores are a softmax of the logits in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import ModelError
from serve.closing import Closing
from serve.describe import ModelFolder, describe
from serve.engines import Array, Engine, open_engine
from serve.text import TextEncoder, Tokens


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one text: a label with its score, or a value where the task is regression."""

    label: str | None
    scores: dict[str, float]
    value: float | None

    def to_json(self) -> dict[str, Any]:
        """What the server sends: label, score and scores, or value alone."""
        if self.label is None:
            return {"value": self.value}
        return {"label": self.label, "score": self.scores[self.label], "scores": self.scores}


def softmax(logits: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, in float64, shifted by the maximum so that it cannot overflow."""
    shifted = logits.astype(np.float64)
    shifted = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


class Classifier(Closing):
    """A classifier or regressor that is ready to answer; close it, or use it in a ``with`` block.

    *engine*: a name to open, or what is open already, which close then leaves alone.
    Raises ArtifactError, ModelError or EngineError where the folder or the runtime is not usable.
    """

    def __init__(self, path: Path, *, engine: str | Engine = "auto", threads: int = 0, verify: bool = False) -> None:
        self.folder: ModelFolder = describe(path, verify=verify)
        if self.folder.task == "text_generation":
            raise ModelError(f"{path} is a language model; give a classifier or regressor.")
        self.encoder = TextEncoder(self.folder.path, max_length=self.folder.max_length)
        self._opened = isinstance(engine, str)
        self.engine: Engine = (
            open_engine(self.folder.path, engine=engine, threads=threads) if isinstance(engine, str) else engine
        )
        if "logits" not in self.engine.outputs:
            self.close()
            raise ModelError(
                f"{path} gives {', '.join(self.engine.outputs)}, not logits; "
                "export a model for sequence classification."
            )

    def logits(self, rows: Sequence[Tokens]) -> Array:
        """One batch through the engine; (rows, labels) float32."""
        logits = self.engine.infer(self.encoder.collate(rows, names=self.engine.inputs))["logits"]
        if logits.ndim != 2 or logits.shape[1] != self.folder.num_labels:
            raise ModelError(
                f"{self.folder.path} gives logits of the shape {logits.shape}, not one column for each of its "
                f"{self.folder.num_labels} labels; export it again."
            )
        return logits

    def predict(self, first: Sequence[str], second: Sequence[str] | None = None) -> list[Prediction]:
        """Answer all texts, or pairs, as one batch, in their order."""
        if not first:
            return []
        logits = self.logits(self.encoder.tokenize(first, second))
        if self.folder.task == "regression":
            return [Prediction(label=None, scores={}, value=float(row[0])) for row in logits]
        labels = self.folder.labels
        return [
            Prediction(label=labels[int(row.argmax())], scores=dict(zip(labels, row.tolist(), strict=True)), value=None)
            for row in softmax(logits)
        ]

    def close(self) -> None:
        """Free the engine, if it was opened here."""
        if self._opened:
            self.engine.close()
