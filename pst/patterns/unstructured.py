"""Unstructured: the int(n k s) entries of lowest score go, wherever they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pst.patterns import check_sparsity

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "unstructured"


@dataclass(frozen=True)
class Unstructured:
    """Any entry may be zero; the count of zeros is int(n k s)."""

    spec: str = "unstructured"
    sparsity: float | None = None
    example: str = EXAMPLE

    def mask(self, scores: "Tensor", sparsity: float, *, axis: int) -> "Tensor":
        """See Pattern.mask."""
        from pst.patterns._select import prune_lowest

        check_sparsity(sparsity)
        return prune_lowest(scores, int(scores.numel() * sparsity))

    def masks(self, scores: "Sequence[Tensor]", sparsities: Sequence[float]) -> "tuple[list[Tensor], Tensor | None]":
        """See BatchPattern.masks."""
        from pst.patterns._select import prune_lowest_each

        for sparsity in sparsities:
            check_sparsity(sparsity)
        return prune_lowest_each(scores, [int(each.numel() * s) for each, s in zip(scores, sparsities, strict=True)])

    def units(self, scores: "Tensor", *, axis: int) -> "Tensor":
        """See SharingPattern.units: every entry by itself."""
        return scores

    def holds(self, weight: "np.ndarray[Any, Any]", *, axis: int) -> bool:
        """Always: every arrangement of zeros is unstructured."""
        return True

    def check(self, shape: tuple[int, ...], *, axis: int, name: str) -> None:
        """Every shape can be pruned without structure."""


def parse(spec: str) -> Unstructured | None:
    """The pattern, where *spec* names it."""
    return Unstructured() if spec == EXAMPLE else None
