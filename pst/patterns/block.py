"""Blocks: R x C tiles (R outputs by C inputs) that stay or go whole.

A tile's score is the mean P(S) of its entries' scores, and its mask bit m stands in all of its entries. A method's
straight-through estimator knows no pattern: dL/dS_ij := dL/dM_ij = G_ij W_ij, entry by entry, here as everywhere.
Carried through the mean it would be dL/dS_ij = (1 / RC) sum over the tile of G W, the tile's mean of the former. Under
gradient descent on S both move P(S), all that decides, by the same amount, because the mean of a mean is that mean;
so the product keeps the one rule. They differ where the optimizer rescales each entry (Adam on movement's T), and by
what A, B, R, C share between tiles.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pst.errors import PatternError
from pst.patterns import check_sparsity

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "block:4x4"


@dataclass(frozen=True)
class Block:
    """Tiles of *rows* outputs by *columns* inputs, scored by the mean over the tile."""

    rows: int
    columns: int
    sparsity: float | None = None
    example: str = EXAMPLE

    @property
    def spec(self) -> str:
        """As typed: ``block:4x4``."""
        return f"block:{self.rows}x{self.columns}"

    def mask(self, scores: "Tensor", sparsity: float, *, axis: int) -> "Tensor":
        """See Pattern.mask: int(tiles * s) tiles of the lowest mean score go. Ties: the lower flat index stays."""
        from pst.patterns._select import require_finite

        by_row = scores if axis == 1 else scores.T
        (mask,), bad = self.masks([by_row], [sparsity])
        require_finite(bad)
        return mask if axis == 1 else mask.T.contiguous()

    def masks(self, scores: "Sequence[Tensor]", sparsities: Sequence[float]) -> "tuple[list[Tensor], Tensor | None]":
        """See BatchPattern.masks."""
        from pst.patterns._select import prune_lowest_each

        for each, sparsity in zip(scores, sparsities, strict=True):
            check_sparsity(sparsity)
            self.check(tuple(each.shape), axis=1, name="scores")
        pooled = [self.units(each, axis=1) for each in scores]
        counts = [int(each.numel() * sparsity) for each, sparsity in zip(pooled, sparsities, strict=True)]
        kept, bad = prune_lowest_each(pooled, counts)
        return [keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1) for keep in kept], bad

    def units(self, scores: "Tensor", *, axis: int) -> "Tensor":
        """See SharingPattern.units: the mean score of each tile, (n / rows, k / columns)."""
        by_row = scores if axis == 1 else scores.T
        n, k = by_row.shape
        return by_row.reshape(n // self.rows, self.rows, k // self.columns, self.columns).mean((1, 3))

    def holds(self, weight: "np.ndarray[Any, Any]", *, axis: int) -> bool:
        """Whether every tile is either all zero or holds no zero."""
        if weight.ndim != 2:
            return False
        by_row = weight if axis == 1 else weight.T
        n, k = by_row.shape
        if n % self.rows or k % self.columns:
            return False
        tiles = (by_row != 0).reshape(n // self.rows, self.rows, k // self.columns, self.columns)
        return bool((tiles.all((1, 3)) | ~tiles.any((1, 3))).all())

    def check(self, shape: tuple[int, ...], *, axis: int, name: str) -> None:
        """See Pattern.check: tiles must cover the weight exactly."""
        outputs, inputs = (shape[0], shape[1]) if axis == 1 else (shape[1], shape[0])
        if outputs % self.rows or inputs % self.columns:
            raise PatternError(
                f"{name} has {outputs} outputs and {inputs} inputs, which tiles of {self.rows}x{self.columns} "
                "do not cover; choose a block that divides both, or --pattern unstructured."
            )


def parse(spec: str) -> Block | None:
    """The pattern, where *spec* reads block:RxC."""
    match = re.fullmatch(r"block:(\d+)x(\d+)", spec)
    if match is None:
        return None
    rows, columns = int(match[1]), int(match[2])
    if rows < 1 or columns < 1 or rows * columns == 1:
        raise PatternError(f"Pattern {spec!r} is not usable: a block has at least two weights, for example {EXAMPLE}.")
    return Block(rows=rows, columns=columns)
