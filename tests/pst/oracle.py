"""PST's equations written out literally in torch, for autograd to differentiate: what the product is compared with.

W = W0 + beta U V
S = |W| + alpha1 A B + alpha2 (R 1' + 1 C')
M = the entries of highest S, made differentiable by M + (S - S.detach())
Y = X (M * W)' + b
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Keep = Callable[[Tensor], Tensor]
"""Scores (n, k) to a mask of ones and zeros (n, k)."""

NAMES = ("U", "V", "A", "B", "R", "C")


def keep_highest(S: Tensor, sparsity: float) -> Tensor:
    """Zeros at the int(n k s) lowest scores, by a sort of all of them."""
    mask = torch.ones_like(S).flatten()
    mask[torch.argsort(S.flatten())[: int(S.numel() * sparsity)]] = 0
    return mask.reshape(S.shape)


def keep_n_of_m(S: Tensor, n: int, m: int) -> Tensor:
    """Zeros at all but the n highest scores of every m along the inputs."""
    groups = S.reshape(-1, m)
    mask = torch.zeros_like(groups)
    mask.scatter_(1, torch.argsort(groups, descending=True)[:, :n], 1)
    return mask.reshape(S.shape)


class OracleLinear(nn.Module):
    """A linear layer under PST; every tensor is a plain parameter, the mask is made in every forward pass."""

    def __init__(
        self,
        W0: Tensor,
        bias: Tensor,
        tensors: Mapping[str, Tensor],
        *,
        keep: Keep,
        alpha1: float,
        alpha2: float,
        beta: float,
        magnitude_gradient: bool,
    ) -> None:
        """For W0 (n, k), bias (n) and U (n, r2), V (r2, k), A (n, r1), B (r1, k), R (n), C (k), which are copied."""
        super().__init__()
        self.W0, self.bias = nn.Parameter(W0.detach().clone()), nn.Parameter(bias.detach().clone())
        self.U, self.V, self.A, self.B, self.R, self.C = (
            nn.Parameter(tensors[name].detach().clone()) for name in NAMES
        )
        self.keep = keep
        self.alpha1, self.alpha2, self.beta, self.magnitude_gradient = alpha1, alpha2, beta, magnitude_gradient

    def weight(self) -> Tensor:
        """W = W0 + beta U V, (n, k)."""
        return self.W0 + self.beta * (self.U @ self.V)

    def scores(self) -> Tensor:
        """S, (n, k), with |W| detached unless magnitude_gradient."""
        W = self.weight() if self.magnitude_gradient else self.weight().detach()
        n, k = W.shape
        rows = self.R.reshape(n, 1) @ W.new_ones(1, k)
        columns = W.new_ones(n, 1) @ self.C.reshape(1, k)
        return W.abs() + self.alpha1 * (self.A @ self.B) + self.alpha2 * (rows + columns)

    def mask(self) -> Tensor:
        """M, (n, k), ones and zeros whose gradient goes straight through to the scores."""
        S = self.scores()
        return self.keep(S.detach()) + (S - S.detach())

    def masked(self) -> Tensor:
        """M * W, (n, k)."""
        return self.mask() * self.weight()

    def forward(self, X: Tensor) -> Tensor:
        """Y = X (M * W)' + b: (batch, k) to (batch, n)."""
        return X @ self.masked().T + self.bias
