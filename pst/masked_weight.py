"""What a method attaches to a weight (torch.nn.utils.parametrize): the mask, and how the masked weight is made.

A masked weight always works on the matrix as outputs x inputs (n, k); ``axis`` says how the module stores it, and the
result is given back in that storage, contiguous, so that a merged module multiplies the very same bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pst.importance import MaskedLowRankWeight, Scales, importance, updated_weight
from pst.patterns import Pattern


class MaskedWeight(nn.Module, ABC):
    """One matrix under a mask. The mask and the sparsity it was made for are buffers, so that they are saved."""

    mask: Tensor  # (n, k) bool, True = kept
    sparsity: Tensor  # () float64

    def __init__(self, weight: Tensor, *, axis: int) -> None:
        """For *weight* as the module stores it: (n, k) with axis 1, (k, n) with axis 0."""
        super().__init__()
        self.axis = axis
        self.register_buffer("mask", torch.ones_like(self.by_row(weight), dtype=torch.bool))
        self.register_buffer("sparsity", torch.zeros((), dtype=torch.float64, device=weight.device))

    def by_row(self, weight: Tensor) -> Tensor:
        """(n, k), outputs x inputs; its own inverse."""
        return weight if self.axis == 1 else weight.T

    @abstractmethod
    def scores(self, weight: Tensor) -> Tensor:
        """Importance of each entry, (n, k); *weight* is the original, as stored."""

    @abstractmethod
    def masked(self, weight: Tensor) -> Tensor:
        """The masked weight, (n, k), differentiable; *weight* is the original as (n, k)."""

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight in the storage of *weight*."""
        return self.by_row(self.masked(self.by_row(weight))).contiguous()

    @torch.no_grad()
    def update_mask_(self, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
        """Choose the mask anew from the present scores."""
        self.mask.copy_(pattern.mask(self.scores(weight), sparsity, axis=1))
        self.sparsity.fill_(sparsity)


class MaskedMagnitude(MaskedWeight):
    """M * W with W itself trained and |W| as the score: gradual magnitude pruning."""

    def scores(self, weight: Tensor) -> Tensor:
        """|W|, (n, k)."""
        return self.by_row(weight).abs()

    def masked(self, weight: Tensor) -> Tensor:
        """M * W; a pruned entry gets no gradient."""
        return weight.masked_fill(~self.mask, 0.0)


class MaskedLowRank(MaskedWeight):
    """PST's masked weight: see pst/importance.py for the equations and the shapes."""

    def __init__(
        self, weight: Tensor, *, axis: int, r1: int, r2: int, scales: Scales, generator: torch.Generator | None = None
    ) -> None:
        """U, A ~ N(0, 1) drawn on the CPU, V, B, R, C = 0: at the start W = W0 and S = |W0|."""
        super().__init__(weight, axis=axis)
        n, k = self.by_row(weight).shape

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(weight))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=weight.dtype, device=weight.device))

        self.scales = scales
        self.U, self.V = normal(n, r2), zeros(r2, k)
        self.A, self.B = normal(n, r1), zeros(r1, k)
        self.R, self.C = zeros(n), zeros(k)

    def scores(self, weight: Tensor) -> Tensor:
        """S = |W| + alpha1 A B + alpha2 (R 1' + 1 C'), (n, k)."""
        W = updated_weight(self.by_row(weight), self.U, self.V, self.scales.beta)
        return importance(W, self.A, self.B, self.R, self.C, self.scales)

    def masked(self, weight: Tensor) -> Tensor:
        """M * (W0 + beta U V), with the straight-through gradient for A, B, R, C."""
        masked = MaskedLowRankWeight.apply(  # type: ignore[no-untyped-call]
            weight, self.U, self.V, self.A, self.B, self.R, self.C, self.mask, self.scales
        )
        return cast(Tensor, masked)


class FusedMaskedWeight(nn.Module):
    """Several matrices side by side along the output axis, each with a mask of its own (GPT-2's c_attn: q, k, v)."""

    def __init__(self, parts: Sequence[MaskedWeight], *, axis: int) -> None:
        """*parts* in the order in which they lie along the output axis."""
        super().__init__()
        self.axis = axis
        self.parts = nn.ModuleList(parts)

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The stored matrices of *weight*, one a part."""
        return weight.chunk(len(self.parts), dim=1 - self.axis)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked matrices, side by side again."""
        pieces = [part(piece) for part, piece in zip(self.parts, self.split(weight), strict=True)]
        return torch.cat(pieces, dim=1 - self.axis)

    @torch.no_grad()
    def update_mask_(self, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
        """Choose each part's mask anew."""
        for part, piece in zip(self.parts, self.split(weight), strict=True):
            cast(MaskedWeight, part).update_mask_(piece, pattern, sparsity)
