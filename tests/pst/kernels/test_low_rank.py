"""Kernels against the plain torch functions and the literal oracle: fresh random inputs, many shapes, odd ones too."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from pst.importance import Scales
from pst.kernels import low_rank
from pst.kernels.matrices import Matrices, together
from pst.masked_weight import MaskedLowRank
from tests.pst.oracle import NAMES, OracleLinear, keep_highest
from tests.pst.test_importance import named

SHAPES = [(40, 24), (7, 5), (70, 130), (1, 9), (64, 64), (33, 1)]
ALIGNED = [(64, 32), (16, 48), (128, 80)]


def make(
    shapes: list[tuple[int, int]],
    device: torch.device,
    *,
    axis: int = 1,
    r1: int = 3,
    r2: int = 5,
    magnitude_gradient: bool = False,
    draw: Callable[..., Tensor] = torch.randn,
) -> Matrices:
    """Matrices with every tensor drawn, half of each mask full."""
    found = []
    for index, (n, k) in enumerate(shapes):
        stored = draw(n, k) if axis == 1 else draw(k, n)
        scales = Scales(
            alpha1=0.5, alpha2=2.0, beta=0.25 * (index + 1), magnitude_gradient=magnitude_gradient
        )  # exact in binary
        stored = stored.to(device)
        part = MaskedLowRank(stored, axis=axis, r1=r1, r2=r2, scales=scales).to(device)
        with torch.no_grad():
            for tensor in (*part.parameters(), part.Q):
                tensor.copy_(draw(*tensor.shape))
            part.mask.copy_(torch.rand(n, k) < 0.5)
        found.append((part, stored))
    return together(found)


def empty(matrices: Matrices, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.full_like(stored, float("nan"), dtype=dtype) for stored in matrices.stored]


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("shapes", [SHAPES, ALIGNED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_weights(axis: int, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    matrices = make(shapes, device, axis=axis)
    made = empty(matrices, dtype)
    low_rank.masked_weights(matrices, made)
    for part, stored, weight in zip(matrices.parts, matrices.stored, made, strict=True):
        expected = part.by_row(part.masked(part.by_row(stored)))
        torch.testing.assert_close(weight, expected.detach().to(dtype))
        assert torch.equal(weight == 0, ~part.by_row(part.mask))


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("shapes", [SHAPES, ALIGNED])
@pytest.mark.parametrize(("r1", "r2"), [(1, 1), (3, 5), (8, 32), (17, 16)])
def test_scores(axis: int, shapes: list[tuple[int, int]], r1: int, r2: int, device: torch.device) -> None:
    matrices = make(shapes, device, axis=axis, r1=r1, r2=r2)
    flat = low_rank.scores(matrices)
    assert flat.shape == (sum(n * k for n, k in shapes),)
    for part, stored, begin, end in zip(
        matrices.parts, matrices.stored, matrices.offsets, matrices.offsets[1:], strict=False
    ):
        torch.testing.assert_close(flat[begin:end].view(part.mask.shape), part.scores(stored).detach())


def test_scores_without_rounding_are_equal_to_the_bit(device: torch.device) -> None:
    """Small multiples of 1/8 have exact products and sums, in whatever order: nothing is left to a tolerance."""

    def draw(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape) / 8

    matrices = make([(48, 40), (9, 31)], device, r1=8, r2=16, draw=draw)
    flat = low_rank.scores(matrices)
    expected = [part.scores(stored).detach().reshape(-1) for part, stored in zip(matrices.parts, matrices.stored)]  # noqa: B905
    assert torch.equal(flat, torch.cat(expected))


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("shapes", [SHAPES, ALIGNED])
@pytest.mark.parametrize("magnitude_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(
    axis: int, shapes: list[tuple[int, int]], magnitude_gradient: bool, dtype: torch.dtype, device: torch.device
) -> None:
    matrices = make(shapes, device, axis=axis, magnitude_gradient=magnitude_gradient)
    grads = [torch.randn(stored.shape).to(device, dtype) for stored in matrices.stored]
    found = low_rank.gradients(matrices, grads)
    assert len(found) == 6 * len(shapes)
    for index, (part, stored, G) in enumerate(zip(matrices.parts, matrices.stored, grads, strict=True)):
        weight = part.by_row(part.masked(part.by_row(stored)))
        tensors = [part.get_parameter(name) for name in NAMES]
        expected = torch.autograd.grad(weight, tensors, G.float())
        for name, mine, theirs in zip(NAMES, found[6 * index : 6 * index + 6], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=named(name))


@pytest.mark.parametrize("magnitude_gradient", [False, True])
def test_gradients_equal_the_literal_oracle(magnitude_gradient: bool, device: torch.device) -> None:
    matrices = make([(20, 36)], device, magnitude_gradient=magnitude_gradient)
    (part,), (W0,) = matrices.parts, matrices.stored
    with torch.no_grad():
        part.Q.fill_(1.0)
    scales = part.scales
    oracle = OracleLinear(
        W0.double(), torch.zeros(20, dtype=torch.float64, device=device),
        {name: part.get_parameter(name).double() for name in NAMES}, keep=partial(keep_highest, sparsity=0.6),
        alpha1=scales.alpha1, alpha2=scales.alpha2, beta=scales.beta, magnitude_gradient=magnitude_gradient,
    )  # fmt: skip
    G = torch.randn(20, 36).to(device)
    weight = oracle.masked()
    part.mask.copy_(keep_highest(oracle.scores().detach(), 0.6) > 0)
    expected = torch.autograd.grad(weight, [oracle.get_parameter(name) for name in NAMES], G.double())
    made = empty(matrices)
    low_rank.masked_weights(matrices, made)
    torch.testing.assert_close(made[0].double(), weight.detach(), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(low_rank.gradients(matrices, [G]), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_matrices_that_lie_side_by_side(device: torch.device) -> None:
    """GPT-2's c_attn: three matrices in one tensor, which the kernels write and read where they lie."""
    stored = torch.randn(24, 3 * 40, device=device)
    found = []
    for piece in stored.chunk(3, dim=1):
        part = MaskedLowRank(piece, axis=0, r1=2, r2=3, scales=Scales(alpha1=1.0, alpha2=1.0, beta=0.5)).to(device)
        with torch.no_grad():
            part.V.copy_(torch.randn(part.V.shape))
            part.mask.copy_(torch.rand(40, 24) < 0.5)
        found.append((part, piece))
    matrices = together(found)
    made = torch.full_like(stored, float("nan"))
    low_rank.masked_weights(matrices, made.chunk(3, dim=1))
    expected = torch.cat([part.masked(piece.T).T for part, piece in found], dim=1)
    torch.testing.assert_close(made, expected.detach())
    G = torch.randn(stored.shape).to(device)
    theirs = torch.autograd.grad(expected, list(matrices.trained), G)
    for mine, other in zip(low_rank.gradients(matrices, G.chunk(3, dim=1)), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_same_inputs_give_the_same_gradients_to_the_bit(device: torch.device) -> None:
    matrices = make([(96, 200), (300, 64)], device, r1=8, r2=32)
    grads = [torch.randn(stored.shape).to(device) for stored in matrices.stored]
    first, again = (low_rank.gradients(matrices, grads) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
