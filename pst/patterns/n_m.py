"""N:M: at most N non-zeros in every M consecutive weights along the reduction axis.

2:4 is what the sparse tensor cores of NVIDIA GPUs from Ampere on multiply. N counts what stays, never the zeros.
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

EXAMPLE = "2:4"


@dataclass(frozen=True)
class NM:
    """Exactly *n* of every *m* consecutive entries along the reduction axis stay.

    A schedule reaches the pattern group by group: at sparsity s below 1 - n/m, the int(groups * s / (1 - n/m)) groups
    that lose the smallest sum of scores are n:m and the others are still dense.
    """

    n: int
    m: int
    example: str = EXAMPLE

    @property
    def spec(self) -> str:
        """As typed: ``2:4``."""
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float | None:
        """1 - n/m: the pattern fixes it."""
        return 1 - self.n / self.m

    def mask(self, scores: "Tensor", sparsity: float, *, axis: int) -> "Tensor":
        """See Pattern.mask. Ties: the lower index along the axis stays. Sparsity is at most 1 - n/m."""
        from pst.patterns._select import require_finite

        by_row = scores if axis == 1 else scores.T
        (mask,), bad = self.masks([by_row], [sparsity])
        require_finite(bad)
        return mask if axis == 1 else mask.T.contiguous()

    def masks(self, scores: "Sequence[Tensor]", sparsities: Sequence[float]) -> "tuple[list[Tensor], Tensor | None]":
        """See BatchPattern.masks."""
        from pst.patterns._select import keep_n_of_m

        final = 1 - self.n / self.m
        switched = []
        for each, sparsity in zip(scores, sparsities, strict=True):
            check_sparsity(sparsity)
            if sparsity > final + 1e-9:
                raise PatternError(f"Pattern {self.spec} has sparsity {final:g}; {sparsity:g} was asked for.")
            self.check(tuple(each.shape), axis=1, name="scores")
            switched.append(int(each.numel() // self.m * min(sparsity / final, 1.0)))
        return keep_n_of_m(scores, self.n, self.m, switched)

    def holds(self, weight: "np.ndarray[Any, Any]", *, axis: int) -> bool:
        """Whether every group of m along *axis* has at most n non-zeros; False where the length is not divisible."""
        if weight.ndim != 2 or weight.shape[axis] % self.m:
            return False
        by_row = weight if axis == 1 else weight.T
        nonzero = np.count_nonzero(by_row.reshape(by_row.shape[0], -1, self.m), axis=-1)
        return bool(nonzero.max(initial=0) <= self.n)

    def check(self, shape: tuple[int, ...], *, axis: int, name: str) -> None:
        """See Pattern.check: the reduction axis must be divisible by m."""
        if shape[axis] % self.m:
            raise PatternError(
                f"{name} has {shape[axis]} weights along its input axis, which {self.m} does not divide; "
                f"pattern {self.spec} cannot hold there. Use --pattern unstructured, or an N:M whose M divides it."
            )


def parse(spec: str) -> NM | None:
    """The pattern, where *spec* reads N:M. Raises PatternError for N:M that leaves nothing or prunes nothing."""
    match = re.fullmatch(r"(\d+):(\d+)", spec)
    if match is None:
        return None
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m <= 64:
        raise PatternError(f"Pattern {spec!r} is not usable: N:M keeps N of every M weights, with 0 < N < M <= 64.")
    return NM(n=n, m=m)
