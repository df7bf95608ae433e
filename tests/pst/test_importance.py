"""The autograd function against the oracle, the formulas of its docstring, and numerical derivatives."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from pst.importance import MaskedLowRankWeight, Scales, importance, updated_weight
from tests.pst.oracle import NAMES, OracleLinear, keep_highest, keep_n_of_m

SHAPES = [(7, 5, 3, 2), (1, 9, 1, 1), (5, 1, 2, 3), (12, 16, 4, 8), (13, 31, 5, 1)]  # n, k, r1, r2
SCALES = [
    Scales(alpha1=1.0, alpha2=1.0, beta=1.0),
    Scales(alpha1=0.7, alpha2=1.9, beta=0.3),
    Scales(alpha1=0.7, alpha2=1.9, beta=0.3, magnitude_gradient=True),
    Scales(alpha1=2.5, alpha2=0.4, beta=-1.7, magnitude_gradient=True),
]


def random_tensors(n: int, k: int, r1: int, r2: int, *, seed: int) -> dict[str, Tensor]:
    """W0 and all trainable tensors, double precision, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W0": (n, k), "U": (n, r2), "V": (r2, k), "A": (n, r1), "B": (r1, k), "R": (n,), "C": (k,)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def named(name: str) -> Callable[[str], str]:
    """Says in a failure which tensor it is."""
    return lambda message: f"{name}: {message}"


def score_inputs(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tensors["A"], tensors["B"], tensors["R"], tensors["C"]


def weight_of(tensors: dict[str, Tensor], scales: Scales) -> Tensor:
    return updated_weight(tensors["W0"], tensors["U"], tensors["V"], scales.beta).detach()


def apply(tensors: dict[str, Tensor], mask: Tensor, scales: Scales) -> Tensor:
    weight: Tensor = MaskedLowRankWeight.apply(*tensors.values(), mask, scales)  # type: ignore[no-untyped-call]
    return weight


def oracle_of(tensors: dict[str, Tensor], bias: Tensor, scales: Scales, sparsity: float) -> OracleLinear:
    return OracleLinear(
        tensors["W0"],
        bias,
        tensors,
        keep=partial(keep_highest, sparsity=sparsity),
        alpha1=scales.alpha1,
        alpha2=scales.alpha2,
        beta=scales.beta,
        magnitude_gradient=scales.magnitude_gradient,
    )


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.9])
def test_outputs_and_gradients_equal_the_oracle(
    shape: tuple[int, int, int, int], scales: Scales, sparsity: float
) -> None:
    n, k, _, _ = shape
    tensors = random_tensors(*shape, seed=n * k)
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(6, k, generator=generator, dtype=torch.float64)
    bias = torch.randn(n, generator=generator, dtype=torch.float64)
    oracle = oracle_of(tensors, bias, scales, sparsity)

    with torch.no_grad():
        S = importance(weight_of(tensors, scales), *score_inputs(tensors), scales)
    torch.testing.assert_close(S, oracle.scores().detach(), rtol=1e-12, atol=1e-12)
    mask = keep_highest(S, sparsity).bool()
    assert int((~mask).sum()) == int(n * k * sparsity)

    Y = torch.nn.functional.linear(X, apply(tensors, mask, scales), bias)
    expected = oracle(X)
    torch.testing.assert_close(Y, expected, rtol=1e-12, atol=1e-12)
    Y.tanh().pow(2).sum().backward()  # type: ignore[no-untyped-call]
    expected.tanh().pow(2).sum().backward()
    for name in ("W0", *NAMES):
        torch.testing.assert_close(
            tensors[name].grad,
            oracle.get_parameter(name).grad,
            rtol=1e-10,
            atol=1e-12,
            msg=named(name),
        )


def test_gradients_equal_the_oracle_under_two_of_four() -> None:
    scales = SCALES[2]
    tensors = random_tensors(9, 20, 3, 2, seed=3)
    oracle = oracle_of(tensors, torch.zeros(9, dtype=torch.float64), scales, 0.0)
    oracle.keep = partial(keep_n_of_m, n=2, m=4)
    mask = oracle.mask().detach().round().bool()
    assert mask.reshape(-1, 4).sum(1).eq(2).all()
    G = torch.randn(9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    apply(tensors, mask, scales).backward(G)  # type: ignore[no-untyped-call]
    oracle.masked().backward(G)  # type: ignore[no-untyped-call]
    for name in ("W0", *NAMES):
        torch.testing.assert_close(tensors[name].grad, oracle.get_parameter(name).grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_the_formulas(shape: tuple[int, int, int, int], scales: Scales) -> None:
    """Entry by entry, as in the docstring, without matrix products."""
    n, k, r1, r2 = shape
    tensors = random_tensors(*shape, seed=5)
    generator = torch.Generator().manual_seed(6)
    M = torch.rand(n, k, generator=generator) < 0.4
    G = torch.randn(n, k, generator=generator, dtype=torch.float64)
    apply(tensors, M, scales).backward(G)  # type: ignore[no-untyped-call]

    W0, U, V, A, B = (tensors[name].detach() for name in ("W0", "U", "V", "A", "B"))
    W = W0 + scales.beta * torch.einsum("ir,rj->ij", U, V)
    dW = G * M + (G * W.abs() if scales.magnitude_gradient else 0)
    formulas = {
        "W0": dW,
        "U": scales.beta * torch.stack([(dW * V[r]).sum(1) for r in range(r2)], 1),
        "V": scales.beta * torch.stack([(dW * U[:, r : r + 1]).sum(0) for r in range(r2)], 0),
        "A": scales.alpha1 * torch.stack([(G * W * B[r]).sum(1) for r in range(r1)], 1),
        "B": scales.alpha1 * torch.stack([(G * W * A[:, r : r + 1]).sum(0) for r in range(r1)], 0),
        "R": scales.alpha2
        * torch.stack([sum((G[i, j] * W[i, j] for j in range(k)), G.new_zeros(())) for i in range(n)]),
        "C": scales.alpha2
        * torch.stack([sum((G[i, j] * W[i, j] for i in range(n)), G.new_zeros(())) for j in range(k)]),
    }
    for name, formula in formulas.items():
        torch.testing.assert_close(tensors[name].grad, formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales", SCALES[:2])
def test_numerical_derivative_of_the_update_under_a_fixed_mask(scales: Scales) -> None:
    tensors = random_tensors(6, 5, 2, 3, seed=7)
    M = torch.rand(6, 5, generator=torch.Generator().manual_seed(8)) < 0.5
    others = {name: tensors[name].detach() for name in ("A", "B", "R", "C")}

    def of_update(W0: Tensor, U: Tensor, V: Tensor) -> Tensor:
        return apply({"W0": W0, "U": U, "V": V, **others}, M, scales)

    assert torch.autograd.gradcheck(of_update, (tensors["W0"], tensors["U"], tensors["V"]))


@pytest.mark.parametrize("scales", SCALES)
def test_numerical_derivative_of_the_scores_with_the_mask_replaced_by_them(scales: Scales) -> None:
    """Straight through says dL/dM = dL/dS: the derivative of S * W in A, B, R, C, and in |W| where it leaks."""
    tensors = random_tensors(6, 5, 2, 3, seed=9)
    M = torch.rand(6, 5, generator=torch.Generator().manual_seed(10)) < 0.5
    G = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    fixed_W = weight_of(tensors, scales)

    def surrogate(U: Tensor, V: Tensor, A: Tensor, B: Tensor, R: Tensor, C: Tensor) -> Tensor:
        oracle = tensors["W0"].detach() + scales.beta * (U @ V)
        magnitude = oracle.abs() if scales.magnitude_gradient else fixed_W.abs()
        S = magnitude + scales.alpha1 * (A @ B) + scales.alpha2 * (R[:, None] + C[None, :])
        return (M * oracle + S * fixed_W).mul(G).sum()

    inputs = tuple(tensors[name] for name in NAMES)
    assert torch.autograd.gradcheck(surrogate, inputs)
    expected = torch.autograd.grad(surrogate(*inputs), inputs)
    actual = torch.autograd.grad(apply(tensors, M, scales), inputs, grad_outputs=G)
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=named(name))


def test_pruned_entries_are_positive_zero_and_kept_ones_are_the_weight() -> None:
    tensors = random_tensors(11, 8, 2, 2, seed=12)
    M = torch.rand(11, 8, generator=torch.Generator().manual_seed(13)) < 0.5
    weight = apply(tensors, M, SCALES[1])
    W = weight_of(tensors, SCALES[1])
    assert torch.equal(weight[M], W[M])
    assert not weight[~M].any()
    assert not torch.signbit(weight[~M]).any()


@pytest.mark.parametrize("trained", NAMES)
def test_only_what_trains_gets_a_gradient(trained: str) -> None:
    tensors = {name: tensor.detach() for name, tensor in random_tensors(6, 5, 2, 3, seed=14).items()}
    tensors[trained].requires_grad_()
    M = torch.rand(6, 5, generator=torch.Generator().manual_seed(15)) < 0.5
    apply(tensors, M, SCALES[2]).sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [trained]


def test_holds_only_its_inputs_and_leaves_them_alone() -> None:
    """No (n, k) tensor but W0 and M lives until the backward pass, and a second pass gives the same gradients."""
    tensors = random_tensors(10, 6, 2, 3, seed=16)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    M = torch.rand(10, 6, generator=torch.Generator().manual_seed(17)) < 0.5
    weight = apply(tensors, M, SCALES[3])
    held = {tensor.data_ptr() for tensor in weight.grad_fn.saved_tensors}  # type: ignore[union-attr]
    assert held <= {tensor.data_ptr() for tensor in (*tensors.values(), M)}
    inputs = tuple(tensors.values())
    first = torch.autograd.grad(weight.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(weight.sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())
