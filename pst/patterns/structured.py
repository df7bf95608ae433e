"""Structured: whole attention heads and feed-forward neurons, which are removed at the end instead of being zero.

One weight by itself cannot follow this pattern: a unit is a set of rows in some weights and of columns in another. So
this file is the user's choice alone, and pst/structured finds the units, chooses among them, and removes them. What is
left is smaller and dense.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pst.errors import PatternError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EXAMPLE = "structured"


@dataclass(kw_only=True)
class Structured:
    """Which units may go, and what the sparsity is a fraction of."""

    target: Literal["macs", "parameters"] = "macs"
    """Sparsity is the fraction of the blocks' multiply-adds (pst/structured/units.py), or of their parameters."""
    kinds: Literal["both", "heads", "neurons"] = "both"
    multiple: int = 8
    """Neurons that a layer keeps are a multiple of this; kernels work on so many at a time."""
    spec: str = "structured"
    sparsity: float | None = None
    example: str = EXAMPLE

    def __post_init__(self) -> None:
        """Raise PatternError for a multiple below 1."""
        if self.multiple < 1:
            raise PatternError(f"structured_multiple is {self.multiple}; it must be at least 1.")

    def mask(self, scores: "Tensor", sparsity: float, *, axis: int) -> "Tensor":
        """Not possible for one weight: PatternError. ``set_sparsity_`` chooses the units of a whole model."""
        raise PatternError("Pattern structured takes heads and neurons, which no weight has by itself; use sparsify_.")

    def holds(self, weight: "np.ndarray[Any, Any]", *, axis: int) -> bool:
        """Of any matrix: units are removed, so that nothing is said of the zeros in what is left."""
        return weight.ndim == 2

    def check(self, shape: tuple[int, ...], *, axis: int, name: str) -> None:
        """Any weight will do; whether the model has units is asked of the model."""


def parse(spec: str) -> Structured | None:
    """The pattern with its defaults, where *spec* reads structured."""
    return Structured() if spec == "structured" else None
