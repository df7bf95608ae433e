"""Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878): every weight trains, the smallest go."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pst.masked_weight import MaskedMagnitude

DEFAULTS = {"lr": 1e-4}


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """|W| is the importance; all parameters train at one learning rate."""

    lr: float = 1e-4
    trains_original: bool = True

    def masked_weight(self, weight: Tensor, *, axis: int, generator: torch.Generator | None = None) -> MaskedMagnitude:
        """See Method."""
        return MaskedMagnitude(weight, axis=axis)

    def select_trainable_(self, model: nn.Module) -> None:
        """Everything trains."""
        model.requires_grad_(True)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """See Method."""
        return [{"params": list(model.parameters()), "lr": self.lr}]


def make(config: Any) -> Magnitude:
    """From the options of a TrainConfig."""
    return Magnitude(lr=config.lr)
