"""Text in, label and score out: a model folder, its tokenizer and an engine put together.

Evaluation and the server both stand on this. Scores are a softmax of the logits in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import ModelError
from serve.describe import ModelFolder, describe, refuse_multi_label
from serve.engines import ANY_SHAPE, Array, Engine, PreparedEngine, Shapes
from serve.holder import EngineHolder
from serve.padding import filled_shape
from serve.text import TextEncoder, Tokens, shape_of

WARM_UPS = 4
"""Inferences of a shape after which the runtimes that record CUDA graphs have recorded it."""


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


class Classifier(EngineHolder):
    """A classifier or regressor that is ready to answer; close it, or use it in a ``with`` block.

    *engine*: a name to open, or what is open already, which close then leaves alone. *shapes*: what an engine that is
    opened here will be given; where it prepares for single ones, batches are filled up to them (serve/padding.py).
    Raises ArtifactError, ModelError or EngineError where the folder or the runtime is not usable.
    """

    def __init__(
        self,
        path: Path,
        *,
        engine: str | Engine = "auto",
        threads: int = 0,
        shapes: Shapes = ANY_SHAPE,
        verify: bool = False,
    ) -> None:
        self.folder: ModelFolder = describe(path, verify=verify)
        if self.folder.task == "text_generation":
            raise ModelError(f"{path} is a language model; give a classifier or regressor.")
        refuse_multi_label(self.folder)
        self.encoder = TextEncoder(self.folder.path, max_length=self.folder.max_length)
        super().__init__(self.folder.path, engine=engine, threads=threads, shapes=shapes)
        self._announced = shapes.fixed
        self._prepared = self._prepared_of(self.engine)
        if "logits" not in self.engine.outputs:
            self.close()
            raise ModelError(
                f"{path} gives {', '.join(self.engine.outputs)}, not logits; "
                "export a model for sequence classification."
            )

    def _prepared_of(self, engine: Engine) -> tuple[tuple[int, int], ...]:
        """What batches may be filled up to; nothing where padding cannot be told from text, or moves it.

        Padding on the left moves a text to later positions, where the model counts them from the left by itself.
        """
        masked = "attention_mask" in engine.inputs and self.encoder.pad_id is not None
        stays = self.encoder.padding_side != "left" or "position_ids" in engine.inputs
        usable = masked and stays and self.opened_here
        return engine.prepared_shapes if usable and isinstance(engine, PreparedEngine) else ()

    def warm_up(self) -> None:
        """The first inferences: of one text, and of each announced shape that later ones gain by.

        On a CPU that is only what was prepared for: a large shape takes many seconds there, and nothing is recorded.
        """
        self.predict(["warm-up"])
        (row,) = self.encoder.tokenize(["warm-up"])
        shapes = self._announced
        if "cpu" in self.engine.name.split("-"):
            shapes = self.engine.prepared_shapes if isinstance(self.engine, PreparedEngine) else ()
        for batch, tokens in shapes:
            whole = Tokens(ids=np.resize(row.ids, tokens), type_ids=np.resize(row.type_ids, tokens))  # unpadded
            feeds = self.encoder.collate([whole] * batch, names=self.engine.inputs)
            for _ in range(WARM_UPS):
                self.engine.infer(feeds)

    def logits(self, rows: Sequence[Tokens]) -> Array:
        """One batch through the engine; (rows, labels) float32."""
        shape = filled_shape(shape_of(rows), self._prepared)
        logits = self.engine.infer(self.encoder.collate(rows, names=self.engine.inputs, shape=shape))["logits"]
        logits = logits[: len(rows)]
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
