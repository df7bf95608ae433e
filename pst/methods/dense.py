"""No pruning: plain fine-tuning of every weight, the baseline of everything else."""

from typing import Any

DEFAULTS = {"lr": 1e-4}


def make(config: Any) -> None:
    """Nothing is masked."""
    return
