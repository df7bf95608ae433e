"""What is attached to a weight: its start, its parameters, its buffers, and both storages of the same matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from pst.importance import Scales
from pst.masked_weight import FusedMaskedWeight, MaskedLowRank, MaskedMagnitude, MaskedWeight
from pst.patterns import parse_pattern
from tests.pst.oracle import NAMES

SCALES = Scales(alpha1=0.8, alpha2=1.3, beta=0.6)
PATTERNS = [("unstructured", 0.7), ("2:4", 0.5), ("2:4", 0.3), ("1:4", 0.75), ("block:4x4", 0.6)]


def low_rank(weight: Tensor, *, axis: int = 1, r1: int = 3, r2: int = 2, seed: int = 0) -> MaskedLowRank:
    generator = torch.Generator().manual_seed(seed)
    return MaskedLowRank(weight, axis=axis, r1=r1, r2=r2, scales=SCALES, generator=generator)


@torch.no_grad()
def move_(module: nn.Module, *, seed: int) -> None:
    """Values as training would leave them: no tensor zero, the scores far from the magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_the_start_weight_and_scores_are_the_original(axis: int, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 24, dtype=dtype)
    attached = low_rank(weight, axis=axis)
    assert torch.equal(attached(weight), weight)
    assert torch.equal(attached.scores(weight), (weight if axis == 1 else weight.T).abs())
    assert attached.mask.all()
    assert float(attached.sparsity) == 0.0
    assert {name for name in NAMES if not getattr(attached, name).any()} == {"V", "B", "R", "C"}
    assert {getattr(attached, name).dtype for name in NAMES} == {dtype}


def test_u_and_a_are_standard_normal_and_seeded() -> None:
    weight = torch.zeros(2000, 10)
    attached, again, other = low_rank(weight), low_rank(weight), low_rank(weight, seed=1)
    for drawn in (attached.U.detach(), attached.A.detach()):
        assert float(drawn.mean()) == pytest.approx(0.0, abs=0.05)
        assert float(drawn.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(attached.U, again.U)
    assert torch.equal(attached.A, again.A)
    assert not torch.equal(attached.U, other.U)


@pytest.mark.parametrize(("n", "k", "rank"), [(7, 5, 1), (32, 48, 8), (1, 9, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_trainable_count(n: int, k: int, rank: int, axis: int) -> None:
    weight = torch.randn(n, k) if axis == 1 else torch.randn(k, n)
    attached = low_rank(weight, axis=axis, r1=rank, r2=rank + 2)
    assert sum(parameter.numel() for parameter in attached.parameters()) == (n + k) * (rank + rank + 2 + 1)
    shapes = {name: tuple(getattr(attached, name).shape) for name in NAMES}
    assert shapes == {"U": (n, rank + 2), "V": (rank + 2, k), "A": (n, rank), "B": (rank, k), "R": (n,), "C": (k,)}


def test_the_masked_weight_is_the_equation_in_either_storage() -> None:
    W0 = torch.randn(12, 20, dtype=torch.float64)
    attached = low_rank(W0)
    move_(attached, seed=1)
    attached.update_mask_(W0, parse_pattern("unstructured"), 0.6)
    U, V, A, B, R, C = (getattr(attached, name).detach() for name in NAMES)
    W = W0 + 0.6 * U @ V
    S = W.abs() + 0.8 * A @ B + 1.3 * (R[:, None] + C)
    torch.testing.assert_close(attached.scores(W0), S, rtol=1e-12, atol=1e-12)
    threshold = S.flatten().sort().values[int(240 * 0.6)]
    assert torch.equal(attached.mask, threshold <= S)
    torch.testing.assert_close(attached(W0), W * attached.mask, rtol=1e-12, atol=1e-12)
    assert float(attached.sparsity) == 0.6

    stored = low_rank(W0.T.contiguous(), axis=0)
    stored.load_state_dict(attached.state_dict())
    result = stored(W0.T.contiguous())
    assert result.shape == (20, 12)
    assert result.is_contiguous()
    assert torch.equal(result.T, attached(W0))


@pytest.mark.parametrize(("spec", "sparsity"), PATTERNS)
def test_conv1d_equals_linear(spec: str, sparsity: float) -> None:
    """The same matrix stored the other way: the same mask, outputs, gradients of every tensor and of the input."""
    linear = nn.Linear(24, 16).double()
    conv = Conv1D(16, 24).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    found: list[tuple[MaskedLowRank, Any, Tensor, Tensor]] = []
    modules: list[tuple[Any, int]] = [(linear, 1), (conv, 0)]
    for module, axis in modules:
        attached = low_rank(module.weight.detach(), axis=axis, seed=7)
        move_(attached, seed=8)
        parametrize.register_parametrization(module, "weight", attached)
        attached.update_mask_(module.parametrizations.weight.original, parse_pattern(spec), sparsity)
        X = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9), requires_grad=True)
        Y = module(X)
        Y.tanh().sum().backward()
        found.append((attached, module, X, Y))
    (one, plain, X, Y), (other, stored, X2, Y2) = found
    assert not one.mask.all()
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(plain.weight, stored.weight.T)
    torch.testing.assert_close(Y, Y2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(X.grad, X2.grad, rtol=1e-12, atol=1e-12)
    for name in NAMES:
        torch.testing.assert_close(one.get_parameter(name).grad, other.get_parameter(name).grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        plain.parametrizations.weight.original.grad,
        stored.parametrizations.weight.original.grad.T,
        rtol=1e-12,
        atol=1e-12,
    )


def test_mask_and_sparsity_are_saved_with_the_weights() -> None:
    weight = torch.randn(8, 12)
    attached = low_rank(weight)
    move_(attached, seed=2)
    attached.update_mask_(weight, parse_pattern("2:4"), 0.5)
    fresh = low_rank(weight, seed=5)
    fresh.load_state_dict(attached.state_dict())
    assert set(attached.state_dict()) == {*NAMES, "Q", "mask", "sparsity"}
    assert torch.equal(fresh.mask, attached.mask)
    assert float(fresh.sparsity) == 0.5
    assert torch.equal(fresh(weight), attached(weight))


def test_the_mask_follows_scores_only_when_it_is_chosen_anew() -> None:
    weight = torch.randn(8, 12)
    attached, pattern = low_rank(weight), parse_pattern("unstructured")
    attached.update_mask_(weight, pattern, 0.5)
    before = attached.mask.clone()
    assert torch.equal(before, pattern.mask(weight.abs(), 0.5, axis=1))
    with torch.no_grad():
        attached.R[3] += 100.0
    attached(weight)
    assert torch.equal(attached.mask, before)
    attached.update_mask_(weight, pattern, 0.5)
    assert attached.mask[3].all()
    assert int((~attached.mask).sum()) == 48
    assert attached.mask.grad_fn is None


@pytest.mark.parametrize("axis", [0, 1])
def test_magnitude_trains_what_stays(axis: int) -> None:
    weight = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    attached = MaskedMagnitude(weight.detach(), axis=axis)
    attached.update_mask_(weight, parse_pattern("2:4"), 0.5)
    kept = attached.mask if axis == 1 else attached.mask.T
    magnitudes = weight.detach().abs() if axis == 1 else weight.detach().abs().T
    groups = magnitudes.reshape(-1, 4)
    assert torch.equal(attached.mask.reshape(-1, 4), groups >= groups.sort(1).values[:, 2:3])
    result = attached(weight)
    assert torch.equal(result, weight * kept)
    ((result - 3) ** 2).sum().backward()  # a pull on the pruned entries too, which they do not follow
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * (weight.detach() - 3) * kept)
    assert list(attached.parameters()) == []


@pytest.mark.parametrize("axis", [0, 1])
def test_fused_matrices_are_masked_each_by_itself(axis: int) -> None:
    """q, k, v of very unlike size: one mask over all would keep nothing of the smallest."""
    pieces = [torch.randn(8, 12) * size for size in (1.0, 100.0, 0.01)]
    stored = torch.cat(pieces, 0) if axis == 1 else torch.cat(pieces, 0).T.contiguous()
    parts: list[MaskedWeight] = [low_rank(piece if axis == 1 else piece.T, axis=axis) for piece in pieces]
    fused = FusedMaskedWeight(parts, axis=axis)
    assert torch.equal(fused(stored), stored)
    fused.update_mask_(stored, parse_pattern("unstructured"), 0.9)
    result = fused(stored)
    assert result.shape == stored.shape
    assert result.is_contiguous()
    by_row = result if axis == 1 else result.T
    for position, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
        expected = parse_pattern("unstructured").mask(piece.abs(), 0.9, axis=1)
        assert torch.equal(part.mask, expected)
        assert torch.equal(by_row[8 * position : 8 * (position + 1)], piece * expected)
        assert int((~part.mask).sum()) == int(96 * 0.9)
        assert sum(parameter.numel() for parameter in part.parameters()) == (8 + 12) * (3 + 2 + 1)


def test_scores_that_overflow_are_refused_and_the_mask_is_kept() -> None:
    weight = torch.randn(8, 12)
    attached = low_rank(weight)
    attached.update_mask_(weight, parse_pattern("unstructured"), 0.5)
    before = attached.mask.clone()
    with torch.no_grad():
        attached.R[0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        attached.update_mask_(weight, parse_pattern("unstructured"), 0.6)
    assert torch.equal(attached.mask, before)
    assert float(attached.sparsity) == 0.5
