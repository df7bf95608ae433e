"""PST's equations written out literally in torch, for autograd to differentiate: what the product is compared with.

W = W0 + beta U V
S = |W| + alpha1 A B + alpha2 (R 1' + 1 C')
M = the entries of highest S, made differentiable by M + (S - S.detach())
Y = X (M * W)' + b
"""

import math
from collections.abc import Callable, Mapping, Sequence

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


def keep_blocks(S: Tensor, rows: int, columns: int, sparsity: float) -> Tensor:
    """Zeros in the int(tiles s) tiles of lowest mean, one tile after the other."""
    means = {
        (i, j): float(S[i : i + rows, j : j + columns].mean())
        for i in range(0, S.shape[0], rows)
        for j in range(0, S.shape[1], columns)
    }
    mask = torch.ones_like(S)
    for i, j in sorted(means, key=lambda at: means[at])[: int(len(means) * sparsity)]:
        mask[i : i + rows, j : j + columns] = 0
    return mask


def keep_in_all(every: Sequence[Tensor], sparsity: float, *, floor: float) -> list[Tensor]:
    """Zeros at the lowest scores of all matrices together, sum int(n k s) of them, by a sort of everything.

    The highest scores of each matrix, *floor* times what it would keep at that sparsity by itself, are out of reach.
    """
    total, candidates = 0, []
    for at, S in enumerate(every):
        zeros = int(S.numel() * sparsity)
        total += zeros
        order = sorted(range(S.numel()), key=S.flatten().tolist().__getitem__)
        reach = S.numel() - math.ceil(floor * (S.numel() - zeros))
        candidates += [(float(S.flatten()[index]), at, index) for index in order[:reach]]
    masks = [torch.ones_like(S).flatten() for S in every]
    for _, at, index in sorted(candidates)[:total]:
        masks[at][index] = 0
    return [mask.reshape(S.shape) for mask, S in zip(masks, every, strict=True)]


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


class OracleMovement(nn.Module):
    """A linear layer under movement pruning: a plain weight, a plain score, the mask made in every forward pass."""

    def __init__(self, W: Tensor, bias: Tensor, *, keep: Keep, soft: bool) -> None:
        """For W (n, k) and bias (n), which are copied; *soft* passes the score through a sigmoid."""
        super().__init__()
        self.W, self.bias = nn.Parameter(W.detach().clone()), nn.Parameter(bias.detach().clone())
        self.T = nn.Parameter(torch.zeros_like(self.W))
        self.keep, self.soft = keep, soft

    def scores(self) -> Tensor:
        """T, where it is equal in the order of |W|."""
        found: Tensor = (self.T + 1e-8 * self.W.abs() / self.W.abs().mean()).detach()
        return found

    def forward(self, X: Tensor) -> Tensor:
        """Y = X (M * W)' + b, with dM := dT."""
        differentiable = torch.sigmoid(self.T) if self.soft else self.T
        M = self.keep(self.scores()) + (differentiable - differentiable.detach())
        return X @ (M * self.W).T + self.bias


class Block(nn.Module):
    """Two linears and a norm between them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second = first, nn.LayerNorm(16), second

    def forward(self, X: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.norm(self.first(X))))
        return found


class Net(nn.Module):
    """Two prunable linears a block, as a Hugging Face model names its parts."""

    base_model_prefix = "base"

    def __init__(self, make: Callable[[str, int, int], nn.Module], *, width: int = 12) -> None:
        super().__init__()
        self.base = nn.ModuleList(
            [Block(make(f"base.{i}.first", width, 16), make(f"base.{i}.second", 16, width)) for i in range(2)]
        )
        self.classifier = nn.Linear(width, 3)

    def forward(self, X: Tensor) -> Tensor:
        for block in self.base:
            X = X + block(X)
        found: Tensor = self.classifier(X)
        return found
