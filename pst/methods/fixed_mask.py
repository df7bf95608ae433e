"""A sparse model goes on to another task with the zeros that it has: a low-rank update under its own mask.

    M  = (W0 != 0)                          never chosen again
    Y  = X (M * (W0 + beta U V))' + b       U, V, head, LayerNorm and biases train; W0 is frozen

An adapter that is merged into a sparse weight fills its zeros; under the mask it cannot, and the merged weight is zero
wherever W0 was. The aim is that of SPP (Lu et al. 2024, arXiv 2405.16057), which keeps the zeros by multiplying W0 with
learned rows and columns; here the update is PST's, added, and masked.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst.errors import PatternError
from pst.importance import updated_weight
from pst.masked_weight import MaskedWeight
from pst.methods._training import groups_by_name, train_head_and_vectors_
from pst.patterns import parse_pattern
from pst.sparsify import prunable_weights

DEFAULTS = {"lr": 5e-4, "lr_update": 1.5e-4, "r2": 32}

KEEPS_ZEROS = True
"""For TrainConfig: pattern and sparsity are the model's, not the user's."""

LIKELY = ("2:4", "4:8")
"""Patterns that a model may hold without saying so: those that a runtime makes use of."""


class MaskedUpdate(MaskedWeight):
    """M * (W0 + beta U V) with the mask that W0 came with."""

    fixed = True

    def __init__(
        self, weight: Tensor, *, axis: int, r2: int, beta: float, generator: torch.Generator | None = None
    ) -> None:
        """M = (W0 != 0), U ~ N(0, 1) drawn on the CPU, V = 0: at the start W = W0."""
        super().__init__(weight, axis=axis)
        n, k = self.by_row(weight).shape
        self.beta = beta
        self.U = nn.Parameter(torch.randn(n, r2, generator=generator).to(weight))
        self.V = nn.Parameter(torch.zeros(r2, k, dtype=weight.dtype, device=weight.device))
        self.mask.copy_(self.by_row(weight) != 0)
        self.sparsity.fill_(1 - int(self.mask.sum()) / self.mask.numel())

    def scores(self, weight: Tensor) -> Tensor:
        """|W|, (n, k); nothing is chosen by it."""
        return updated_weight(self.by_row(weight), self.U, self.V, self.beta).abs()

    def masked(self, weight: Tensor) -> Tensor:
        """M * (W0 + beta U V); keeps U, V and the mask for the backward pass."""
        return torch.where(self.mask, updated_weight(weight, self.U, self.V, self.beta), 0.0)


@dataclass(frozen=True, kw_only=True)
class FixedMask:
    """Ranks and rates as in PST, without scores."""

    r2: int = 32
    beta: float = 1.0
    lr: float = 5e-4
    lr_update: float = 1.5e-4
    trains_original: bool = False

    def masked_weight(self, weight: Tensor, *, axis: int, generator: torch.Generator | None = None) -> MaskedUpdate:
        """See Method."""
        return MaskedUpdate(weight, axis=axis, r2=self.r2, beta=self.beta, generator=generator)

    def select_trainable_(self, model: nn.Module) -> None:
        """Vectors (LayerNorm, biases) and the task head train beside U and V."""
        train_head_and_vectors_(model)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Two groups: update (U, V), and the rest."""
        return groups_by_name(model, ("UV", self.lr_update), rest=self.lr)


def make(config: Any) -> FixedMask:
    """From the options of a TrainConfig."""
    return FixedMask(r2=config.r2, beta=config.beta, lr=config.lr, lr_update=config.lr_update)


def settled(model: nn.Module, *, pattern: str, source: str = "") -> dict[str, Any]:
    """What a run on the plain, sparse *model* should call its ``pattern`` and ``sparsity``; changes of a TrainConfig.

    A *pattern* that the user chose is kept, and sparsify_ refuses it where the zeros do not follow it. For
    "unstructured", which they always follow, it is what the folder *source* says in its sparsity.json, or one of
    LIKELY, where every matrix holds it. The sparsity is measured, and the schedule begins there.
    """
    masks = [((matrix != 0).cpu().numpy(), item.axis) for item in prunable_weights(model) for matrix in item.matrices()]
    total, kept = sum(mask.size for mask, _ in masks), sum(int(mask.sum()) for mask, _ in masks)
    if pattern == "unstructured":
        stated = _stated_pattern(source)
        for spec in (*([stated] if stated else []), *LIKELY):
            if all(parse_pattern(spec).holds(mask, axis=axis) for mask, axis in masks):
                pattern = spec
                break
    sparsity = 1 - kept / total
    return {"pattern": pattern, "sparsity": sparsity, "sparsity_initial": sparsity}


def _stated_pattern(source: str) -> str | None:
    """The pattern in the sparsity.json of the folder *source*, where there is one that this version knows."""
    try:
        spec = str(json.loads((Path(source) / "sparsity.json").read_text(encoding="utf-8"))["pattern"])
        return parse_pattern(spec).spec
    except (OSError, ValueError, KeyError, TypeError, PatternError):
        return None
