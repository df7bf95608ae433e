"""Compensation against the optimal brain surgeon's steps with every inverse taken anew."""

import pytest
import torch
from torch import Tensor

from pst.compensation import BLOCK, DAMPING, compensate, input_scale
from pst.patterns import parse_pattern


def literal(W: Tensor, H: Tensor, M: Tensor) -> Tensor:
    """Column by column, row by row, with the inverse of what is left of H."""
    damped = H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    W = W.clone()
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(damped[j:, j:])
        for i in range(W.shape[0]):
            if not M[i, j]:
                W[i, j:] -= W[i, j] / inverse[0, 0] * inverse[0]
    return W * M


def made_up(n: int, k: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (n, k) and inputs (tokens, k) that a quarter as many causes explain for the most part, as real ones."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, k // 4, generator=generator, dtype=torch.float64)
    X = causes @ torch.randn(k // 4, k, generator=generator, dtype=torch.float64)
    X += 0.5 * torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    return torch.randn(n, k, generator=generator, dtype=torch.float64), X


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize(("n", "k", "tokens"), [(4, 8, 50), (12, 36, 20), (8, BLOCK + 20, 300), (4, 2 * BLOCK, 100)])
def test_the_same_as_one_inverse_a_column(n: int, k: int, tokens: int, pattern: str) -> None:
    W, X = made_up(n, k, tokens, seed=n + k)
    H = X.T @ X
    M = parse_pattern(pattern).mask(W.abs(), 0.5, axis=1)
    torch.testing.assert_close(compensate(W, H, M), literal(W, H, M), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_outputs_come_nearer(sparsity: float) -> None:
    W, X = made_up(16, 64, 500, seed=1)
    M = parse_pattern("unstructured").mask(W.abs() * input_scale(X.T @ X), sparsity, axis=1)
    made = compensate(W, X.T @ X, M)
    assert torch.equal(made != 0, M)

    def error(other: Tensor) -> float:
        return float((X @ (other - W).T).norm())

    best = torch.zeros_like(W)  # the least squares of each row by itself: what the greedy order can only approach
    for i, kept in enumerate(M):
        best[i, kept] = torch.linalg.lstsq(X[:, kept], (X @ W[i]).unsqueeze(1)).solution[:, 0]
    assert error(best) < error(made) < 0.95 * error(W * M)


def test_nothing_pruned_changes_nothing() -> None:
    W, X = made_up(4, 16, 40, seed=2)
    assert torch.equal(compensate(W, X.T @ X, torch.ones_like(W, dtype=torch.bool)), W)


def test_inputs_that_never_vary() -> None:
    """Dead inputs, fewer tokens than inputs, none at all: damping keeps the inverse."""
    W, X = made_up(4, 16, 3, seed=3)
    X[:, 5] = 0
    M = parse_pattern("2:4").mask(W.abs(), 0.5, axis=1)
    for H in (X.T @ X, torch.zeros(16, 16, dtype=torch.float64)):
        made = compensate(W.float(), H.float(), M)
        assert made.dtype == torch.float32
        assert bool(torch.isfinite(made).all())
        assert torch.equal(made == 0, ~M)
    assert torch.equal(compensate(W, torch.zeros(16, 16, dtype=torch.float64), M), W * M)
    with pytest.raises(ValueError, match="NaN or infinity"):
        compensate(W, X.T @ X * torch.nan, M)


def test_scale_of_the_inputs() -> None:
    _, X = made_up(1, 8, 30, seed=4)
    expected = torch.stack([column.norm() for column in X.T])
    torch.testing.assert_close(input_scale(X.T @ X), expected / expected.mean())
    assert torch.equal(input_scale(torch.zeros(3, 3)), torch.ones(3))
