"""The loss of a batch: the task's own, and what a dense teacher says about the same rows.

L = (1 - w) L_task + w (L_logits + h L_hidden)

L_logits   T^2 KL(softmax(z_teacher / T) || softmax(z / T)), the mean over rows, or over target tokens
           (Hinton, Vinyals, Dean, arXiv 1503.02531); for a single output, the squared difference
L_hidden   squared difference of hidden states over real tokens, as a share of the teacher's squares, each layer with
           the teacher's at the same depth, the mean over layers (Kurtic et al., arXiv 2310.06927); only where both
           are as wide
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label of a position that is no target, as in transformers."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Computes the loss of one batch; see the head of this module for w (weight), T (temperature) and h (hidden)."""

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    weight: float = 0.5
    temperature: float = 2.0
    hidden: float = 1.0

    def __call__(
        self, model: nn.Module, batch: dict[str, Tensor], *, lesson: Any = None, whole: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar; *batch* holds the model's inputs and ``labels`` (B,) or, of a language model, (B, T).

        Where the batch is a part of another: *lesson*, what ``teach`` said of it, and *whole*, see hidden_loss.
        """
        if self.teacher is None:
            return self._task_loss(model(**batch), batch["labels"])
        taught = self.teach(batch) if lesson is None else lesson
        output = model(**batch, output_hidden_states=self.hidden > 0)
        loss = logits_loss(output.logits, taught.logits, batch["labels"], self.temperature)
        if self.hidden and output.hidden_states[0].shape[-1] == taught.hidden_states[0].shape[-1]:
            states = output.hidden_states, taught.hidden_states, batch["attention_mask"]
            loss = loss + self.hidden * hidden_loss(*states, whole=whole)
        return (1 - self.weight) * self._task_loss(output, batch["labels"]) + self.weight * loss

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor]) -> Any:
        """The teacher's output for *batch*."""
        assert self.teacher is not None
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.teacher(**inputs, output_hidden_states=self.hidden > 0)

    def _task_loss(self, output: Any, labels: Tensor) -> Tensor:
        logits: Tensor = output.logits
        if not self.label_smoothing or logits.shape[-1] == 1:
            loss: Tensor = output.loss
            return loss
        if labels.ndim == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=self.label_smoothing)


def next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, V) and (B, T) to the (targets, V) logits that predict, and the (targets,) tokens that follow."""
    target = labels[:, 1:]
    chosen = target != IGNORED
    return logits[:, :-1][chosen], target[chosen]


def logits_loss(logits: Tensor, taught: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_logits; (B, classes), or (B, T, V) with (B, T) labels that say which positions count."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.float(), taught.float())
    counts = torch.ones_like(labels, dtype=torch.bool)
    if labels.ndim == 2:
        logits, taught, counts = logits[:, :-1], taught[:, :-1], labels[:, 1:] != IGNORED
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(taught.float() / temperature, dim=-1)
    each = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
    return _mean(each, counts) * temperature**2


def squares(lesson: Any, attention_mask: Tensor) -> Tensor:
    """(layers,) the sum over real tokens of the mean square of the teacher's states; parts of a batch add up."""
    real = attention_mask.bool()
    each = [torch.where(real, state.float().square().mean(-1), 0.0).sum() for state in lesson.hidden_states[1:]]
    return torch.stack(each)


def hidden_loss(
    states: tuple[Tensor, ...], taught: tuple[Tensor, ...], attention_mask: Tensor, *, whole: Tensor | None = None
) -> Tensor:
    """L_hidden; *states* are the outputs of the embedding and of each layer, (B, T, width), *taught* the teacher's.

    whole: of a part of a batch, the ``squares`` of the batch times the part's share of the loss. The losses of the
    parts, each times its share, are then those of the batch.
    """
    real = attention_mask.bool()
    layers, deep = len(states) - 1, len(taught) - 1
    losses = []
    for layer in range(1, layers + 1):
        place = round(layer * deep / layers)
        target = taught[place].float()
        difference = (states[layer].float() - target).square().mean(-1)
        if whole is None:
            losses.append(_mean(difference, real) / _mean(target.square().mean(-1), real))
        else:
            losses.append(torch.where(real, difference, 0.0).sum() / whole[place - 1])
    return torch.stack(losses).mean()


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of those *values* that count, without a shape that depends on how many these are."""
    return torch.where(counts, values, 0.0).sum() / counts.sum()
