"""The published PST written down as its equations stand, to be measured against: what every forward pass then costs.

    W = W0 + U V
    S = |W| + A B + R 1' + 1 C'
    M = the entries of highest S, by a sort of all of them (unstructured) or of every group of M (N:M)
    Y = X (M * W)' + b                    dL/dS := dL/dM, straight through, |W| not detached

W0 (n, k) and b (n) are frozen; U (n, r), V (r, k), A (n, r), B (r, k), R (n) and C (k) train, and nothing else of the
model does. Li et al., IJCAI 2022, arXiv 2205.11005. The product is pst/methods/pst.py; nobody should train with this.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pst.errors import PatternError
from pst.patterns import parse_pattern
from pst.patterns.n_m import NM
from pst.sparsify import prunable_weights


class StraightThroughMask(torch.autograd.Function):
    """Scores (n, k) to ones and zeros of their dtype; the gradient of the mask goes to the scores unchanged."""

    @staticmethod
    def forward(ctx: Any, S: Tensor, kept: tuple[int, int] | None, sparsity: float) -> Tensor:
        """*kept*: (N, M) of N:M, or None for the int(n k sparsity) lowest of all to go."""
        if kept is None:
            mask = torch.ones_like(S).flatten()
            mask[torch.argsort(S.flatten())[: int(S.numel() * sparsity)]] = 0
            return mask.reshape(S.shape)
        groups = S.reshape(-1, kept[1])
        mask = torch.zeros_like(groups)
        mask.scatter_(1, torch.argsort(groups, descending=True)[:, : kept[0]], 1)
        return mask.reshape(S.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dL/dS := dL/dM."""
        return grad_outputs[0], None, None


class LiteralLinear(nn.Module):
    """In place of an nn.Linear: takes over its weight and bias, frozen."""

    def __init__(self, linear: nn.Linear, *, rank: int, pattern: str, sparsity: float) -> None:
        """*pattern*: unstructured or N:M. Raises PatternError for any other."""
        super().__init__()
        parsed = parse_pattern(pattern)
        if not isinstance(parsed, NM) and parsed.spec != "unstructured":
            raise PatternError(f"The literal PST knows unstructured and N:M, not {pattern}.")
        self.kept = (parsed.n, parsed.m) if isinstance(parsed, NM) else None
        self.sparsity = sparsity
        self.W0, self.bias = linear.weight.requires_grad_(False), linear.bias.requires_grad_(False)
        n, k = linear.weight.shape

        def tensor(*shape: int, normal: bool = False) -> nn.Parameter:
            made = torch.randn(*shape) if normal else torch.zeros(*shape)
            return nn.Parameter(made.to(linear.weight))

        self.U, self.V = tensor(n, rank, normal=True), tensor(rank, k)
        self.A, self.B = tensor(n, rank, normal=True), tensor(rank, k)
        self.R, self.C = tensor(n), tensor(k)

    def forward(self, X: Tensor) -> Tensor:
        """Y = X (M * W)' + b: (..., k) to (..., n)."""
        W = self.W0 + self.U @ self.V
        S = W.abs() + self.A @ self.B + self.R.unsqueeze(1) + self.C
        M = cast(Tensor, StraightThroughMask.apply(S, self.kept, self.sparsity))  # type: ignore[no-untyped-call]
        return F.linear(X, M * W, self.bias)


def replace_linears_(model: nn.Module, *, rank: int, pattern: str, sparsity: float) -> list[nn.Parameter]:
    """Replace every prunable nn.Linear of *model*, freeze all else, and return what trains."""
    names = [item.name.removesuffix(".weight") for item in prunable_weights(model)]
    model.requires_grad_(False)
    for name in names:
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, LiteralLinear(linear, rank=rank, pattern=pattern, sparsity=sparsity))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
