"""The mathematics of PST, in the symbols of its paper (Li et al., IJCAI 2022, arXiv 2205.11005).

    n, k       outputs and inputs of one weight         r1, r2     ranks of the score and of the weight update
    W0 (n, k)  the pretrained weight, frozen            U (n, r2), V (r2, k)    low-rank update of the weight
    M  (n, k)  the mask, True where a weight stays      A (n, r1), B (r1, k)    low-rank part of the score
                                                        R (n), C (k)            row and column part of the score

    W  = W0 + beta U V                                       weight with its update
    S  = |W| + alpha1 A B + alpha2 (R 1' + 1 C')             data-free plus data-driven importance
    M  = the entries of highest S, as the pattern decides
    Y  = X (M * W)' + b                                      * is elementwise

The mask has no derivative of its own; the straight-through estimator takes dL/dS := dL/dM, entry by entry whatever the
pattern (for scores that are pooled over blocks, see pst/patterns/block.py). With G = dL/d(M * W):

    dA = alpha1 (G * W) B'    dB = alpha1 A' (G * W)    dR_i = alpha2 sum_j (G * W)_ij    dC_j = alpha2 sum_i (G * W)_ij
    dW = G * M                dU = beta dW V'           dV = beta U' dW

The published code does not detach |W| in S, which adds G * |W| to dW; ``magnitude_gradient=True`` reproduces it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The factors of one weight's equations."""

    alpha1: float
    alpha2: float
    beta: float
    magnitude_gradient: bool = False


def full_precision(tensor: Tensor) -> torch.autocast:
    """Within: no autocast. Weights and scores are made in their own dtype; the layer casts the finished weight.

    So a merged weight gives the same products under autocast as the masked one, and gradients keep their dtype.
    """
    return torch.autocast(tensor.device.type, enabled=False)


def updated_weight(W0: Tensor, U: Tensor, V: Tensor, beta: float) -> Tensor:
    """W = W0 + beta U V, shape (n, k)."""
    with full_precision(W0):
        return torch.addmm(W0, U, V, alpha=beta)


def importance(
    W: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor, scales: Scales, *, Q: Tensor | None = None
) -> Tensor:
    """S = |W| + alpha1 A B + alpha2 (R 1' + 1 C'), shape (n, k); with *Q* (k), |W| Q in place of |W|."""
    with full_precision(W):
        magnitude = W.abs() if Q is None else W.abs() * Q
        S = torch.addmm(magnitude, A, B, alpha=scales.alpha1)
    S += scales.alpha2 * R.unsqueeze(1)
    S += scales.alpha2 * C
    return S


class MaskedLowRankWeight(torch.autograd.Function):
    """M * (W0 + beta U V) with the straight-through gradient of the scores.

    Keeps only its inputs for the backward pass: W is computed again there instead of being held, (n, k) a weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        W0: Tensor,
        U: Tensor,
        V: Tensor,
        A: Tensor,
        B: Tensor,
        R: Tensor,
        C: Tensor,
        M: Tensor,
        scales: Scales,
    ) -> Tensor:
        """The masked weight, shape (n, k); pruned entries are +0.0."""
        ctx.save_for_backward(W0, U, V, A, B, M)
        ctx.scales = scales
        return updated_weight(W0, U, V, scales.beta).masked_fill_(~M, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of W0, U, V, A, B, R, C from G = dL/d(M * W), as in the head of this module."""
        (G,) = grad_outputs
        W0, U, V, A, B, M = ctx.saved_tensors
        scales: Scales = ctx.scales
        need_W0, need_U, need_V, need_A, need_B, need_R, need_C = ctx.needs_input_grad[:7]
        dA = dB = dR = dC = None
        dW = G * M
        if need_A or need_B or need_R or need_C or scales.magnitude_gradient:
            W = updated_weight(W0, U, V, scales.beta)
            if scales.magnitude_gradient:
                dW = dW + G * W.abs()
            dS = W.mul_(G)
            with full_precision(dS):
                dA = scales.alpha1 * (dS @ B.T) if need_A else None
                dB = scales.alpha1 * (A.T @ dS) if need_B else None
            dR = scales.alpha2 * dS.sum(1) if need_R else None
            dC = scales.alpha2 * dS.sum(0) if need_C else None
        with full_precision(dW):
            dU = scales.beta * (dW @ V.T) if need_U else None
            dV = scales.beta * (U.T @ dW) if need_V else None
        return dW if need_W0 else None, dU, dV, dA, dB, dR, dC, None, None
