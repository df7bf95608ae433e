"""Movement pruning (Sanh, Wolf and Rush 2020, arXiv 2005.07683): what training moves away from zero stays.

    W (n, k)  the weight, dense and trained      T (n, k)  its score, trained, 0 at the start
    M (n, k)  the mask: the entries of highest T, as the pattern decides

    Y  = X (M * W)' + b            with G = dL/d(M * W):
    dW = G * M                     a pruned entry of W rests, but its score may bring it back
    dT = G * W                     straight through, dL/dT := dL/dM

Gradient descent makes T the sum of -lr_scores G * W: large where W grew, negative where it was pushed towards 0.
All T are 0 at first, and entries of equal T have to go in some order: the smaller |W| goes first. That order is added
to T as TIE |W| / mean |W|, so small that it decides nothing once training has told two scores apart. The first mask is
magnitude's.

T is as large as the weight, and so are its gradient and the optimizer's state: no memory is saved in training.
Scores of different weights compare as they are under a global budget: each has moved by its rate, not by its weight's
size, and the published soft variant holds one threshold against all of them.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pst.masked_weight import MaskedWeight, mean_magnitude
from pst.methods._training import groups_by_name

DEFAULTS = {"lr": 1e-4, "lr_scores": 1e-2}
"""lr_scores as published; the published lr, 3e-5, is for BERT-base and tens of thousands of steps."""

TIE = 1e-8
"""Weight of |W| / mean |W| in the order of scores: below any step of an optimizer at a usual rate."""


class MovementWeight(torch.autograd.Function):
    """M * W with the straight-through gradient of T; see the head of this module."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, T: Tensor, M: Tensor, sigmoid: bool) -> Tensor:
        """The masked weight, (n, k); pruned entries are +0.0. *sigmoid*: see pst/methods/soft_movement.py."""
        ctx.save_for_backward(W, M, *((T,) if sigmoid else ()))
        return torch.where(M, W, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dW = G * M and dT = G * W, or G * W * sigmoid'(T)."""
        (G,) = grad_outputs
        W, M, *scores = ctx.saved_tensors
        need_W, need_T = ctx.needs_input_grad[:2]
        dT = G * W if need_T else None
        if dT is not None and scores:
            soft = torch.sigmoid(scores[0])
            dT *= soft * (1 - soft)
        return G * M if need_W else None, dT, None, None


class MaskedMovement(MaskedWeight):
    """M * W with W and its score T trained."""

    sigmoid = False

    def __init__(self, weight: Tensor, *, axis: int) -> None:
        """T = 0."""
        super().__init__(weight, axis=axis)
        self.T = nn.Parameter(torch.zeros_like(self.by_row(weight), memory_format=torch.contiguous_format))

    def scores(self, weight: Tensor) -> Tensor:
        """T, with ties in the order of |W|, (n, k)."""
        by_row = self.by_row(weight.detach())
        return self.T.detach() + (TIE / mean_magnitude(weight)) * by_row.abs()

    def common_scores(self, weight: Tensor) -> Tensor:
        """The scores themselves: T has no scale of its weight's."""
        return self.scores(weight)

    def masked(self, weight: Tensor) -> Tensor:
        """M * W, with the straight-through gradient for T."""
        masked = MovementWeight.apply(weight, self.T, self.mask, self.sigmoid)  # type: ignore[no-untyped-call]
        return cast(Tensor, masked)


@dataclass(frozen=True, kw_only=True)
class Movement:
    """All parameters train at *lr*, the scores T at *lr_scores*."""

    lr: float = 1e-4
    lr_scores: float = 1e-2
    trains_original: bool = True

    def masked_weight(self, weight: Tensor, *, axis: int, generator: torch.Generator | None = None) -> MaskedWeight:
        """See Method."""
        return MaskedMovement(weight, axis=axis)

    def select_trainable_(self, model: nn.Module) -> None:
        """Everything trains."""
        model.requires_grad_(True)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two groups: the scores, and every weight of the model."""
        return groups_by_name(model, ("T", self.lr_scores), rest=self.lr)


def make(config: Any) -> Movement:
    """From the options of a TrainConfig."""
    return Movement(lr=config.lr, lr_scores=config.lr_scores)
