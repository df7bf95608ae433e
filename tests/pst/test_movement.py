"""Movement and soft movement: gradients by formula, whole training steps against plain layers, ties, blocks."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pst.budget import FLOOR
from pst.masked_weight import FusedMaskedWeight
from pst.materialize import masked_weights
from pst.methods.movement import MaskedMovement, Movement, MovementWeight
from pst.methods.soft_movement import MaskedSoftMovement, SoftMovement
from pst.patterns import parse_pattern
from pst.schedule import CubicSchedule
from pst.sparsify import merge_, set_sparsity_, sparsify_
from tests.pst.oracle import Net, OracleMovement, keep_blocks, keep_highest, keep_in_all, keep_n_of_m

METHODS = [Movement(lr=2e-2, lr_scores=5e-2), SoftMovement(lr=2e-2, lr_scores=5e-2)]


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apply(W: Tensor, T: Tensor, M: Tensor, sigmoid: bool) -> Tensor:
    masked: Tensor = MovementWeight.apply(W, T, M, sigmoid)  # type: ignore[no-untyped-call]
    return masked


# -- the function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("n", "k"), [(7, 5), (1, 9), (16, 12)])
def test_gradients_equal_the_formulas(n: int, k: int, soft: bool) -> None:
    W, T, G = some(n, k, seed=1).requires_grad_(), (3 * some(n, k, seed=2)).requires_grad_(), some(n, k, seed=3)
    M = some(n, k, seed=4) > 0
    result = apply(W, T, M, soft)
    assert torch.equal(result, torch.where(M, W, torch.zeros_like(W)))
    assert not torch.signbit(result[~M]).any()
    result.backward(G)  # type: ignore[no-untyped-call]
    slope = 1 / (T.exp() + 2 + (-T).exp()) if soft else 1.0  # the derivative of the sigmoid
    torch.testing.assert_close(W.grad, G * M, rtol=1e-12, atol=0)
    torch.testing.assert_close(T.grad, (G * W * slope).detach(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("soft", [False, True])
def test_numerical_derivatives_with_the_mask_replaced_by_the_score(soft: bool) -> None:
    """Straight through: dT is the derivative of score * W in the score, dW that of M * W."""
    W, T = some(4, 6, seed=5).requires_grad_(), some(4, 6, seed=6).requires_grad_()
    M, G = some(4, 6, seed=7) > 0, some(4, 6, seed=8)

    def surrogate(W: Tensor, T: Tensor) -> Tensor:
        return (M * W + (torch.sigmoid(T) if soft else T) * W.detach()).mul(G).sum()

    assert torch.autograd.gradcheck(lambda T: surrogate(W, T), (T,))
    expected = torch.autograd.grad(surrogate(W, T), (W, T))
    actual = torch.autograd.grad(apply(W, T, M, soft), (W, T), grad_outputs=G)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_what_is_frozen_gets_no_gradient_and_nothing_but_the_inputs_is_held() -> None:
    W, T, M = some(6, 4, seed=9).requires_grad_(), some(6, 4, seed=10), some(6, 4, seed=11) > 0
    assert torch.autograd.grad(apply(W, T, M, True).sum(), W)[0].equal(M.double())
    W, T = W.detach(), T.requires_grad_()
    result = apply(W, T, M, True)
    held = {tensor.data_ptr() for tensor in result.grad_fn.saved_tensors}  # type: ignore[union-attr]
    assert held == {tensor.data_ptr() for tensor in (W, T, M)}
    assert torch.autograd.grad(result.sum(), T)[0].shape == (6, 4)


# -- the first mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("spec", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5), ("block:4x4", 0.5)])
def test_before_any_step_the_mask_is_magnitudes(axis: int, spec: str, sparsity: float) -> None:
    weight = some(16, 24, seed=12).float() * 0.04
    stored = weight if axis == 1 else weight.T.contiguous()
    for attached in (MaskedMovement(stored, axis=axis), MaskedSoftMovement(stored, axis=axis)):
        assert not attached.T.any()
        assert torch.equal(attached(stored), stored)
        attached.update_mask_(stored, parse_pattern(spec), sparsity)
        assert torch.equal(attached.mask, parse_pattern(spec).mask(weight.abs(), sparsity, axis=1))
        assert torch.equal(attached.common_scores(stored), attached.scores(stored))


def test_scores_decide_and_magnitude_only_between_equal_ones() -> None:
    """Against a literal order by score, then magnitude; a step of 1e-4 is far above the largest tie."""
    weight = some(16, 24, seed=13).float()
    attached = MaskedMovement(weight, axis=1)
    steps = torch.randint(-2, 3, (16, 24), generator=torch.Generator().manual_seed(14))
    with torch.no_grad():
        attached.T.copy_(steps * 1e-4)
    attached.update_mask_(weight, parse_pattern("unstructured"), 0.6)
    order = sorted(range(384), key=lambda at: (int(steps.flatten()[at]), float(weight.abs().flatten()[at])))
    assert sorted(order[: int(384 * 0.6)]) == torch.nonzero(~attached.mask.flatten()).flatten().tolist()


def test_an_all_zero_weight_is_no_division_by_zero() -> None:
    weight = torch.zeros(4, 8)
    attached = MaskedMovement(weight, axis=1)
    attached.update_mask_(weight, parse_pattern("unstructured"), 0.5)
    assert int(attached.mask.sum()) == 16


# -- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "budget"),
    [("unstructured", "local"), ("2:4", "local"), ("block:2x2", "local"), ("unstructured", "global")],
)
@pytest.mark.parametrize("method", METHODS, ids=["movement", "soft_movement"])
def test_training_steps_equal_the_oracle(method: Movement, budget: Any, pattern: str) -> None:
    """Ten AdamW steps along the schedule in double precision, then every tensor and the merged weights."""
    final = 0.5 if pattern == "2:4" else 0.8
    schedule = CubicSchedule(initial=final if pattern == "2:4" else 0.0, final=final, steps=10)
    soft = isinstance(method, SoftMovement)
    torch.manual_seed(0)
    ours = Net(lambda _, inputs, outputs: nn.Linear(inputs, outputs)).double()
    plain = {name: value.clone() for name, value in ours.state_dict().items()}
    names = [item.name for item in sparsify_(ours, method=method, pattern=pattern)]
    theirs = Net(
        lambda name, *_: OracleMovement(
            plain[f"{name}.weight"], plain[f"{name}.bias"], keep=partial(keep_n_of_m, n=2, m=4), soft=soft
        )
    ).double()
    theirs.load_state_dict({name: value for name, value in plain.items() if name not in names}, strict=False)
    scores = [value for name, value in theirs.named_parameters() if name.endswith(".T")]
    rest = [value for name, value in theirs.named_parameters() if not name.endswith(".T")]
    options: dict[str, Any] = {"weight_decay": 0.02}
    our_optimizer = torch.optim.AdamW(method.param_groups(ours), **options)
    groups = [{"params": scores, "lr": method.lr_scores}, {"params": rest, "lr": method.lr}]
    their_optimizer = torch.optim.AdamW(groups, **options)
    layers = [theirs.get_submodule(name.removesuffix(".weight")) for name in names]

    def choose(sparsity: float) -> None:
        set_sparsity_(ours, sparsity, budget=budget)
        oracles = [layer for layer in layers if isinstance(layer, OracleMovement)]
        assert len(oracles) == 4
        if budget == "global":
            masks = keep_in_all([layer.scores() for layer in oracles], sparsity, floor=FLOOR)
            for layer, mask in zip(oracles, masks, strict=True):
                layer.keep = lambda _, mask=mask: mask  # type: ignore[misc]
        elif pattern != "2:4":
            keep = keep_highest if pattern == "unstructured" else partial(keep_blocks, rows=2, columns=2)
            for layer in oracles:
                layer.keep = partial(keep, sparsity=sparsity)

    generator = torch.Generator().manual_seed(1)
    for step in range(10):
        X = torch.randn(5, 12, dtype=torch.float64, generator=generator)
        labels = torch.randint(3, (5,), generator=generator)
        choose(schedule(step))
        losses = []
        for net, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(X), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)

    found = dict(ours.named_parameters())
    for name, layer in zip(names, layers, strict=True):
        prefix = f"{name.removesuffix('.weight')}.parametrizations.weight"
        torch.testing.assert_close(found[f"{prefix}.original"], layer.W, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found[f"{prefix}.0.T"], layer.T, rtol=1e-8, atol=1e-10)
        assert layer.T.any()  # type: ignore[operator]
    choose(final)
    merge_(ours)
    kept = []
    for name, layer in zip(names, layers, strict=True):
        assert isinstance(layer, OracleMovement)
        mask = layer.keep(layer.scores())
        torch.testing.assert_close(ours.get_parameter(name), mask * layer.W, rtol=1e-8, atol=1e-10)
        kept.append(float(mask.mean()))
        magnitude = keep_highest(plain[name].abs(), final)
        assert pattern != "unstructured" or not torch.equal(mask, magnitude)  # training had its say
    assert (len({round(share, 2) for share in kept}) > 1) == (budget == "global")


def test_training_moves_an_entry_back_in() -> None:
    """A pruned entry's score follows the gradient that the entry would have had."""
    layer = nn.Linear(8, 4, bias=False)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"linear": layer})])})
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[2, 5] = 0.5  # the smallest: goes first
    sparsify_(model, method=Movement())
    set_sparsity_(model, 1 / 32)
    _, attached = next(masked_weights(model))
    mask = attached.get_buffer("mask")
    assert torch.nonzero(~mask).tolist() == [[2, 5]]
    optimizer = torch.optim.SGD(Movement(lr=0.0, lr_scores=1.0).param_groups(model))
    goal = torch.zeros(4)
    goal[2] = 100.0  # asks for more of row 2, which its pruned entry would give
    (layer(torch.ones(1, 8)) - goal).square().sum().backward()
    optimizer.step()
    set_sparsity_(model, 1 / 32)
    assert mask[2].all()
    assert int((~mask).sum()) == 1


# -- groups, sizes, blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=["movement", "soft_movement"])
def test_everything_trains_and_scores_have_a_rate_of_their_own(method: Movement) -> None:
    model = Net(lambda _, inputs, outputs: nn.Linear(inputs, outputs))
    plain = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(item.weight.numel() for item in sparsify_(model, method=method))
    scores, rest = method.param_groups(model)
    assert (scores["lr"], rest["lr"]) == (5e-2, 2e-2)
    assert [sum(each.numel() for each in group["params"]) for group in (scores, rest)] == [prunable, plain]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_soft_movement_shares_one_budget_unless_told_otherwise() -> None:
    model, other = (Net(lambda _, inputs, outputs: nn.Linear(inputs, outputs)) for _ in range(2))
    weights = sparsify_(model, method=SoftMovement())
    with torch.no_grad():
        for index, (_, attached) in enumerate(masked_weights(model)):
            assert not isinstance(attached, FusedMaskedWeight)
            attached.get_parameter("T").fill_(0.01 * index)

    def zeros() -> list[int]:
        return [int((item.weight == 0).sum()) for item in weights]

    set_sparsity_(model, 0.5)
    assert zeros() == [192 - 10, 192 - 10, 20, 0]  # the lowest scores go, down to a tenth of the local 96 that stay
    set_sparsity_(model, 0.5, budget="local")
    assert zeros() == [96] * 4
    weights = sparsify_(other, method=SoftMovement(), pattern="2:4")  # a ratio in every group: nothing to share
    set_sparsity_(other, 0.5)
    assert zeros() == [96] * 4


@pytest.mark.parametrize("soft", [False, True])
def test_under_blocks_the_gradient_is_that_of_the_entries_and_moves_the_mean_as_a_shared_score_would(
    soft: bool,
) -> None:
    """Literally, through the mean over a tile, every entry would get the tile's mean gradient: the same mean."""
    weight, G = some(8, 12, seed=20), some(8, 12, seed=21)
    attached = (MaskedSoftMovement if soft else MaskedMovement)(weight, axis=1)
    pattern = parse_pattern("block:2x3")
    attached.update_mask_(weight, pattern, 0.5)
    attached(weight).backward(G)
    found = attached.T.grad
    assert found is not None
    torch.testing.assert_close(found, G * weight * (0.25 if soft else 1.0), rtol=1e-12, atol=0)

    T = torch.zeros(8, 12, dtype=torch.float64, requires_grad=True)
    pooled = T.reshape(4, 2, 4, 3).mean((1, 3)).repeat_interleave(2, 0).repeat_interleave(3, 1)
    pooled = torch.sigmoid(pooled) if soft else pooled
    literal = keep_blocks(attached.scores(weight), 2, 3, 0.5) + (pooled - pooled.detach())
    assert torch.equal(literal.detach().bool(), attached.mask)
    (literal * weight).backward(G)  # type: ignore[no-untyped-call]
    assert T.grad is not None
    tiles = partial(pattern.units, axis=1)  # type: ignore[attr-defined]
    torch.testing.assert_close(tiles(found), tiles(T.grad), rtol=1e-12, atol=1e-15)
    assert float((found - T.grad).abs().max()) > 0.01
