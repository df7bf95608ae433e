"""How much of a model training drops."""

from torch import nn


def set_dropout_(model: nn.Module, share: float) -> None:
    """Every dropout of *model* drops this *share* of its input, from 0 to 1, attention's included.

    Those that are layers, and those that a transformers attention keeps as a number, ``attention_dropout``.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = share
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = share  # type: ignore[assignment]
