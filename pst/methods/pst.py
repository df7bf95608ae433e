"""PST: a frozen weight with a low-rank update, scored by magnitude plus a learned low-rank and row-column part."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pst.importance import Scales
from pst.masked_weight import MaskedLowRank
from pst.methods._training import groups_by_name, train_head_and_vectors_

DEFAULTS = {"lr": 5e-4, "lr_update": 1.5e-4, "lr_scores": 1e-3, "r1": 8, "r2": 32, "alpha": "mean"}
DEFAULTS |= {"calibration": 256}
DEFAULTS |= {"sparsity_initial": 0.5, "sparsity_warmup": 0.0, "sparsity_cooldown": 0.5}
"""Half of the weights go at once, which calibration makes up for, so that half of the steps are left at the end."""
FINETUNED = {"lr": 1e-4, "lr_update": 3e-5, "lr_scores": 2e-4}
"""A fifth of the rates, for a model that knows the task already and keeps most of its weights; LOG.md has the runs."""
TAUGHT: dict[str, Any] = {"teacher": "start", "distill_weight": 0.9, "distill_hidden": 10.0, "dropout": 0.0}
"""N:M of such a model: what it computed while it was dense, at the full rates; LOG.md has the runs."""
FAITHFUL = {"lr": 3e-5, "lr_update": 3e-5, "lr_scores": 3e-5, "r1": 8, "r2": 8, "alpha": "one"}
FAITHFUL |= {"epochs": 20.0, "lr_warmup": 0.0, "max_grad_norm": 1.0, "seed": 43}  # its settings for BERT-base on GLUE


def defaults(*, pattern: str, sparsity: float, finetuned: bool, alone: bool) -> dict[str, Any]:
    """DEFAULTS, with TAUGHT or FINETUNED where they were measured to be better: at most 60%, not in blocks.

    alone: no teacher is wanted.
    """
    if not finetuned or sparsity > 0.6:
        return DEFAULTS
    if re.fullmatch(r"\d+:\d+", pattern):
        return DEFAULTS | (FINETUNED if alone else TAUGHT)
    return DEFAULTS | (FINETUNED if pattern == "unstructured" else {})


@dataclass(frozen=True, kw_only=True)
class PST:
    """Options of the method. The defaults differ from the paper where LOG.md shows a gain; ``faithful`` undoes that.

    alpha: "mean" sets alpha1 = alpha2 = mean |W0| of each weight, so that lr_scores is in units of its weights;
    "one" is the published 1.
    """

    r1: int = 8
    r2: int = 32
    alpha: str = "mean"
    beta: float = 1.0
    lr: float = 5e-4
    lr_update: float = 1.5e-4
    lr_scores: float = 1e-3
    faithful: bool = False
    """Published behaviour: only U, V, A, B, R, C train (head, LayerNorm and biases frozen), |W| is not detached."""
    trains_original: bool = False

    def masked_weight(self, weight: Tensor, *, axis: int, generator: torch.Generator | None = None) -> MaskedLowRank:
        """See Method."""
        alpha = float(weight.abs().mean()) if self.alpha == "mean" else 1.0
        scales = Scales(alpha1=alpha, alpha2=alpha, beta=self.beta, magnitude_gradient=self.faithful)
        return MaskedLowRank(weight, axis=axis, r1=self.r1, r2=self.r2, scales=scales, generator=generator)

    def select_trainable_(self, model: nn.Module) -> None:
        """Vectors (LayerNorm, biases) and the task head train beside the low-rank tensors, unless faithful."""
        if self.faithful:
            model.requires_grad_(False)
        else:
            train_head_and_vectors_(model)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Three groups, each with its learning rate: update (U, V), scores (A, B, R, C), and the rest."""
        return groups_by_name(model, ("UV", self.lr_update), ("ABRC", self.lr_scores), rest=self.lr)


def make(config: Any) -> PST:
    """From the options of a TrainConfig."""
    return PST(
        r1=config.r1,
        r2=config.r2,
        alpha=config.alpha,
        beta=config.beta,
        lr=config.lr,
        lr_update=config.lr_update,
        lr_scores=config.lr_scores,
        faithful=config.faithful,
    )
