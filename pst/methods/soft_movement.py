"""Soft movement pruning (Sanh, Wolf and Rush 2020, arXiv 2005.07683): one threshold for the scores of all weights.

Published: M = sigmoid(T) > tau with one tau for the whole model, and lambda sum sigmoid(T) added to the loss. The
penalty pushes scores down until enough of them have fallen below tau: lambda sets the sparsity, and what it comes to is
known only afterwards. Each matrix keeps what it needs, not a common share.

Here the sparsity is given, as for every method, and exact. So the threshold follows the schedule instead of the scores
falling towards a threshold that stands still: tau is whatever leaves the scheduled number of entries over all matrices
together (the global budget of pst/budget.py; a sigmoid keeps the order, so T is compared itself). With that the penalty
has lost its task, and is left out.

The straight-through estimator steps over the threshold alone and differentiates the sigmoid:

    dL/dT = G * W * sigmoid'(T)        against G * W in movement

so that a score slows down as it settles on either side. (The published code passes the gradient through both unchanged:
that is method movement with a global budget.) Under N:M, whose ratio holds in every group, no budget can be shared;
the scores then compete within their groups, as in every method. See pst/methods/movement.py for the rest.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pst.methods.movement import MaskedMovement, Movement

DEFAULTS = {"lr": 1e-4, "lr_scores": 1e-2}


class MaskedSoftMovement(MaskedMovement):
    """M * W with W and its score T trained, T through a sigmoid."""

    sigmoid = True
    budget: Literal["local", "global"] = "global"


@dataclass(frozen=True, kw_only=True)
class SoftMovement(Movement):
    """All parameters train at *lr*, the scores T at *lr_scores*; all weights share one budget."""

    def masked_weight(
        self, weight: Tensor, *, axis: int, generator: torch.Generator | None = None
    ) -> MaskedSoftMovement:
        """See Method."""
        return MaskedSoftMovement(weight, axis=axis)


def make(config: Any) -> SoftMovement:
    """From the options of a TrainConfig."""
    return SoftMovement(lr=config.lr, lr_scores=config.lr_scores)
