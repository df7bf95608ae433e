"""What a method attaches to a weight (torch.nn.utils.parametrize): the mask, and how the masked weight is made.

A masked weight always works on the matrix as outputs x inputs (n, k); ``axis`` says how the module stores it, and the
result is given back in that storage, contiguous, so that a merged module multiplies the very same bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from pst.importance import MaskedLowRankWeight, Scales, importance, updated_weight
from pst.patterns import Pattern


class MaskedWeight(nn.Module, ABC):
    """One matrix under a mask. The mask and the sparsity it was made for are buffers, so that they are saved."""

    mask: Tensor  # (n, k) bool, True = kept
    sparsity: Tensor  # () float64

    budget: Literal["local", "global"] = "local"
    """What ``set_sparsity_`` does when it is not told, and the pattern allows it."""
    fixed: bool = False
    """Whether the mask stays as it was made, whatever the schedule says."""
    pattern: Pattern | None = None
    """What shape its mask has, once ``sparsify_`` has attached it."""
    most: float = 1.0
    """Its own final sparsity under a plan (pst/plan.py), which the schedule of all weights may go beyond."""
    made: Tensor | None = None
    """The masked weight in the module's storage, where it was made ahead together with others (pst/materialize.py)."""

    def __init__(self, weight: Tensor, *, axis: int) -> None:
        """For *weight* as the module stores it: (n, k) with axis 1, (k, n) with axis 0."""
        super().__init__()
        self.axis = axis
        shape = self.by_row(weight).shape
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=weight.device))
        self.register_buffer("sparsity", torch.zeros((), dtype=torch.float64, device=weight.device))

    def by_row(self, weight: Tensor) -> Tensor:
        """(n, k), outputs x inputs; its own inverse."""
        return weight if self.axis == 1 else weight.T

    @abstractmethod
    def scores(self, weight: Tensor) -> Tensor:
        """Importance of each entry, (n, k); *weight* is the original, as stored."""

    def common_scores(self, weight: Tensor) -> Tensor:
        """Scores that may be compared with those of other matrices, (n, k): here in units of the mean |weight|."""
        return self.scores(weight) / mean_magnitude(weight)

    @abstractmethod
    def masked(self, weight: Tensor) -> Tensor:
        """The masked weight, (n, k), differentiable; *weight* is the original as (n, k)."""

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight in the storage of *weight*."""
        if self.made is not None:
            return self.made
        return self.by_row(self.masked(self.by_row(weight))).contiguous()

    def matrices(self, weight: Tensor) -> list[tuple["MaskedWeight", Tensor]]:
        """Each matrix under a mask of its own, with its part of *weight* as stored: here the one."""
        return [(self, weight)]

    @torch.no_grad()
    def update_mask_(self, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
        """Choose the mask anew from the present scores; a fixed one stays."""
        if self.fixed:
            return
        self.mask.copy_(pattern.mask(self.scores(weight), sparsity, axis=1))
        self.sparsity.fill_(sparsity)


class MaskedMagnitude(MaskedWeight):
    """M * W with W itself trained and |W| Q as the score: gradual magnitude pruning, where Q is ones."""

    Q: Tensor  # as in MaskedLowRank

    def __init__(self, weight: Tensor, *, axis: int) -> None:
        """For *weight* as stored."""
        super().__init__(weight, axis=axis)
        self.register_buffer("Q", torch.ones(self.mask.shape[1], dtype=weight.dtype, device=weight.device))

    def scores(self, weight: Tensor) -> Tensor:
        """|W| Q, (n, k)."""
        return self.by_row(weight).abs() * self.Q

    def fold_(self, weight: Tensor) -> None:
        """Nothing: the weight itself trains."""

    def masked(self, weight: Tensor) -> Tensor:
        """M * W; a pruned entry gets no gradient."""
        return torch.where(self.mask, weight, 0.0)


class MaskedLowRank(MaskedWeight):
    """PST's masked weight: see pst/importance.py for the equations and the shapes."""

    Q: Tensor  # (k) scale of each input, ones unless the weight was calibrated (pst/calibration.py)

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
        self.register_buffer("Q", torch.ones(k, dtype=weight.dtype, device=weight.device))

    def scores(self, weight: Tensor) -> Tensor:
        """S = |W| Q + alpha1 A B + alpha2 (R 1' + 1 C'), (n, k)."""
        W = updated_weight(self.by_row(weight), self.U, self.V, self.scales.beta)
        return importance(W, self.A, self.B, self.R, self.C, self.scales, Q=self.Q)

    @torch.no_grad()
    def fold_(self, weight: Tensor) -> None:
        """Take the update up into *weight*, as stored: W0 := W0 + beta U V, V := 0."""
        by_row = self.by_row(weight)
        by_row.copy_(updated_weight(by_row, self.U, self.V, self.scales.beta))
        self.V.zero_()

    def masked(self, weight: Tensor) -> Tensor:
        """M * (W0 + beta U V), with the straight-through gradient for A, B, R, C."""
        masked = MaskedLowRankWeight.apply(  # type: ignore[no-untyped-call]
            weight, self.U, self.V, self.A, self.B, self.R, self.C, self.mask, self.scales
        )
        return cast(Tensor, masked)


class FusedMaskedWeight(nn.Module):
    """Several matrices side by side along the output axis, each with a mask of its own (GPT-2's c_attn: q, k, v)."""

    made: Tensor | None = None
    """As in MaskedWeight: all of them."""

    def __init__(self, parts: Sequence[MaskedWeight], *, axis: int) -> None:
        """*parts* in the order in which they lie along the output axis."""
        super().__init__()
        self.axis = axis
        self.parts = nn.ModuleList(parts)

    def matrices(self, weight: Tensor) -> list[tuple[MaskedWeight, Tensor]]:
        """Each matrix under a mask of its own, with its part of *weight* as stored."""
        pieces = weight.chunk(len(self.parts), dim=1 - self.axis)
        return [(cast(MaskedWeight, part), piece) for part, piece in zip(self.parts, pieces, strict=True)]

    def forward(self, weight: Tensor) -> Tensor:
        """The masked matrices, side by side again."""
        if self.made is not None:
            return self.made
        return torch.cat([part(piece) for part, piece in self.matrices(weight)], dim=1 - self.axis)

    @torch.no_grad()
    def update_mask_(self, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
        """Choose each part's mask anew."""
        for part, piece in self.matrices(weight):
            part.update_mask_(piece, pattern, sparsity)


def mean_magnitude(weight: Tensor) -> Tensor:
    """Mean |W|, a scalar that can be divided by: that of an all-zero weight counts as the smallest number."""
    mean = weight.detach().abs().mean(dtype=torch.float32 if weight.dtype != torch.float64 else None)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny)
