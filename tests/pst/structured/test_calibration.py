"""What the loss of a unit costs and what the rest makes up for, against least squares by torch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pst.compensation import DAMPING
from pst.errors import ModelError
from pst.methods.pst import PST
from pst.patterns.structured import Structured
from pst.sparsify import sparsify_
from pst.structured.calibration import compensate_unit, least_squares, scale_units_, unit_losses
from pst.structured.storage import from_pretrained
from pst.structured.units import find_units
from tests.pst.structured.models import make, matrix

N, K = 6, 12


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """W (n, k), inputs with the damping as rows of their own, and H without it; inputs that depend on each other."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, K, generator=generator, dtype=torch.float64) @ torch.randn(
        K, K, generator=generator, dtype=torch.float64
    )
    H = X.T @ X
    damping = torch.eye(K, dtype=torch.float64) * (DAMPING * H.diagonal().mean()).sqrt()
    return torch.randn(N, K, generator=generator, dtype=torch.float64), torch.cat([X, damping]), H


def by_lstsq(W: Tensor, X: Tensor, keep: Tensor) -> tuple[Tensor, float]:
    """The best weight without the columns that *keep* leaves out, and its squared error."""
    solution = torch.zeros_like(W)
    solution[:, keep] = torch.linalg.lstsq(X[:, keep], X @ W.T).solution.T
    return solution, float(((X @ (solution - W).T) ** 2).sum())


def test_least_squares() -> None:
    W, X, H = problem()
    keep = torch.arange(K) % 3 != 1
    expected, _ = by_lstsq(W, X, keep)
    torch.testing.assert_close(least_squares(W, H, keep), expected, rtol=1e-8, atol=1e-10)
    mask = keep.expand(N, K)
    torch.testing.assert_close(compensate_unit(W, H, mask), expected, rtol=1e-8, atol=1e-10)
    assert compensate_unit(W, H, torch.ones_like(mask)) is W


@pytest.mark.parametrize("width", [1, 3])
def test_the_loss_of_a_unit_is_what_remains_after_the_best_adjustment(width: int) -> None:
    W, X, H = problem()
    expected = [by_lstsq(W, X, torch.arange(K) // width != unit)[1] for unit in range(K // width)]
    torch.testing.assert_close(unit_losses(W, H, width), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_pooled_scores_are_losses_over_costs(tmp_path: Path) -> None:
    model = from_pretrained("AutoModelForSequenceClassification", make(tmp_path, "bert"))
    sparsify_(model, method=PST(), pattern=Structured())
    units, moments, losses = find_units(model), {}, []
    generator = torch.Generator().manual_seed(0)
    for one in units:
        for member in (*one.producers, one.consumer):
            part, piece = matrix(member)
            X = torch.randn(100, piece.shape[1], generator=generator)
            moments[part] = (piece, X.T @ X)
        part, piece = matrix(one.consumer)
        losses.append(unit_losses(piece, moments[part][1], one.consumer.width) / one.macs)
    scale_units_(model, moments)
    mean = sum(float((E * one.macs).sum()) for E, one in zip(losses, units, strict=True))
    mean /= sum(one.count * one.macs for one in units)
    for one, E in zip(units, losses, strict=True):
        part, piece = matrix(one.consumer)
        pooled = part.common_scores(piece).T.reshape(one.count, -1).sum(1) / one.macs
        torch.testing.assert_close(pooled.double(), E / mean, rtol=1e-4, atol=1e-6)
        assert all(
            float(matrix(member)[0].scores(matrix(member)[1]).detach().abs().max()) == 0 for member in one.producers
        )


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    W, _, H = problem()
    H[0, 0] = float("inf")
    with pytest.raises(ValueError, match="second moments"):
        least_squares(W, H, torch.arange(K) > 0)
    model = from_pretrained("AutoModelForSequenceClassification", make(tmp_path, "bert"))
    sparsify_(model, method=PST(), pattern=Structured())
    moments = {}
    for one in find_units(model):
        for member in (*one.producers, one.consumer):
            part, piece = matrix(member)
            moments[part] = (piece, torch.full((piece.shape[1], piece.shape[1]), float("nan")))
    with pytest.raises(ModelError, match="the heads of layer 0 are judged cannot be used"):
        scale_units_(model, moments)
