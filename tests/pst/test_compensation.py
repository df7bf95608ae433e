"""Compensation against the least squares of each row by itself, and refined masks against those that they began as."""

import pytest
import torch
from torch import Tensor

from pst import compensation
from pst.compensation import DAMPING, compensate, input_scale, refine
from pst.patterns import parse_pattern


def literal(W: Tensor, H: Tensor, M: Tensor) -> Tensor:
    """Row by row, the normal equations of the entries that stay."""
    damped = H + DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    made = torch.zeros_like(W)
    for i, kept in enumerate(M):
        made[i, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ W[i])
    return made


def objective(W: Tensor, H: Tensor, made: Tensor) -> float:
    """What compensation minimizes."""
    D = made - W
    return float(((D @ H) * D).sum() + DAMPING * H.diagonal().mean() * D.square().sum())


def error(X: Tensor, W: Tensor, made: Tensor) -> float:
    """Of the outputs."""
    return float((X @ (made - W).T).norm())


def made_up(n: int, k: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight (n, k) and inputs (tokens, k) that a quarter as many causes explain for the most part, as real ones."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(tokens, k // 4, generator=generator, dtype=torch.float64)
    X = causes @ torch.randn(k // 4, k, generator=generator, dtype=torch.float64)
    X += 0.5 * torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    return torch.randn(n, k, generator=generator, dtype=torch.float64), X


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize(("n", "k", "tokens"), [(4, 8, 50), (12, 36, 20), (8, 148, 300), (4, 256, 100)])
def test_the_same_as_least_squares_of_each_row(
    n: int, k: int, tokens: int, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, X = made_up(n, k, tokens, seed=n + k)
    H = X.T @ X
    M = parse_pattern(pattern).mask(W.abs(), 0.5, axis=1)
    best, near = literal(W, H, M), compensate(W, H, M)
    assert torch.equal(near != 0, M)
    assert objective(W, H, near) < 1.001 * objective(W, H, best)
    monkeypatch.setattr(compensation, "TOLERANCE", 1e-9)
    monkeypatch.setattr(compensation, "MOST_STEPS", 1000)
    torch.testing.assert_close(compensate(W, H, M), best, rtol=1e-5, atol=1e-7)


def test_a_row_without_weights_stays_empty() -> None:
    W, X = made_up(4, 16, 40, seed=5)
    M = parse_pattern("unstructured").mask(W.abs(), 0.5, axis=1)
    M[2] = False
    made = compensate(W, X.T @ X, M)
    assert torch.equal(made[2], torch.zeros(16, dtype=W.dtype))
    assert objective(W, X.T @ X, made) < 1.001 * objective(W, X.T @ X, literal(W, X.T @ X, M))


@pytest.mark.parametrize(
    ("spec", "sparsity"),
    [("unstructured", 0.25), ("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5), ("1:4", 0.75)],
)
def test_a_refined_mask_brings_the_outputs_nearer(spec: str, sparsity: float) -> None:
    W, X = made_up(16, 64, 500, seed=1)
    H, pattern = X.T @ X, parse_pattern(spec)
    M = pattern.mask(W.abs() * input_scale(H), sparsity, axis=1)
    better = refine(W, H, M, lambda S: pattern.mask(S, sparsity, axis=1))
    assert int(better.sum()) == int(M.sum())
    assert pattern.holds(better.numpy(), axis=1)
    errors = [error(X, W, each) for each in (compensate(W, H, better), compensate(W, H, M), W * M)]
    share = {0.25: 1.001, 0.5: 0.95, 0.75: 0.9, 0.8: 0.6}[sparsity]  # where most stay, the first mask is as good
    assert errors[0] < share * errors[1] < share * errors[2]


def test_blocks_stay_blocks() -> None:
    """Their scores are pooled, so that a mask can become a little worse; it stays one of blocks, as sparse."""
    W, X = made_up(16, 64, 500, seed=1)
    H, pattern = X.T @ X, parse_pattern("block:4x4")
    M = pattern.mask(W.abs() * input_scale(H), 0.5, axis=1)
    refined = refine(W, H, M, lambda S: pattern.mask(S, 0.5, axis=1))
    assert int(refined.sum()) == int(M.sum())
    assert pattern.holds(refined.numpy(), axis=1)
    assert error(X, W, compensate(W, H, refined)) < 1.02 * error(X, W, compensate(W, H, M))


def test_a_mask_that_others_choose() -> None:
    """Scores that are added to those of the weight, as a method has learned them, take part in every choice."""
    W, X = made_up(8, 32, 200, seed=6)
    H, pattern = X.T @ X, parse_pattern("unstructured")
    wanted = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    learned = 1e6 * wanted
    share = 1 - float(wanted.float().mean()) + 1e-6

    def choose(S: Tensor) -> Tensor:
        return pattern.mask(S + learned, share, axis=1)

    assert torch.equal(refine(W, H, choose(W.abs()), choose), wanted)


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
    with pytest.raises(ValueError, match="NaN or infinity"):
        refine(W, X.T @ X * torch.nan, M, lambda _: M)


def test_scale_of_the_inputs() -> None:
    _, X = made_up(1, 8, 30, seed=4)
    expected = torch.stack([column.norm() for column in X.T])
    torch.testing.assert_close(input_scale(X.T @ X), expected / expected.mean())
    assert torch.equal(input_scale(torch.zeros(3, 3)), torch.ones(3))
