"""Masks and checks of every pattern against brute force in plain Python: exact counts, the rule for ties, the axis."""

import subprocess
import sys
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from pst.errors import PatternError
from pst.patterns import check_sparsity, parse_pattern
from pst.patterns._select import _keep_by_sort, _keep_by_threshold, prune_lowest

SHAPES = [(1, 1), (1, 7), (5, 3), (17, 13), (32, 48)]
SPARSITIES = [0.0, 1e-9, 0.1, 0.29, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1 - 2**-53]
RATIOS = [(1, 2), (2, 4), (1, 4), (3, 4), (1, 3), (4, 8), (2, 5), (1, 16), (6, 7)]


def lowest_first(scores: list[float]) -> list[int]:
    """Positions in the order in which they go: the lowest score first, of equal ones the last."""
    return sorted(range(len(scores)), key=lambda at: (scores[at], -at))


def brute_force_unstructured(scores: Tensor, count: int) -> list[bool]:
    gone = set(lowest_first(scores.flatten().tolist())[:count])
    return [at not in gone for at in range(scores.numel())]


def brute_force_groups(row: list[float], n: int, m: int) -> list[list[bool]]:
    """Which entries of each group of one row along the reduction axis stay."""
    groups = [row[start : start + m] for start in range(0, len(row), m)]
    return [[at not in lowest_first(group)[: m - n] for at in range(m)] for group in groups]


def some_scores(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "continuous":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "quantised":
        return torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "equal":
        return torch.full(shape, 0.25)
    assert kind == "zeros of both signs"
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -0.0, 0.0)


KINDS = ["continuous", "quantised", "equal", "zeros of both signs"]


# -- unstructured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unstructured_equals_brute_force(kind: str, shape: tuple[int, int]) -> None:
    for seed, sparsity in enumerate(SPARSITIES):
        scores = some_scores(kind, shape, seed)
        count = int(shape[0] * shape[1] * sparsity)
        mask = parse_pattern("unstructured").mask(scores, sparsity, axis=1)
        assert mask.shape == shape
        assert mask.dtype == torch.bool
        assert int((~mask).sum()) == count
        assert mask.flatten().tolist() == brute_force_unstructured(scores, count), (kind, shape, sparsity)


def test_ties_keep_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    assert parse_pattern("unstructured").mask(scores, 0.25, axis=1).int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert parse_pattern("unstructured").mask(scores, 0.75, axis=1).int().tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert parse_pattern("1:2").mask(scores, 0.5, axis=1).int().tolist() == [[1, 0, 0, 1], [1, 0, 1, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_both_selections_agree_entry_for_entry(kind: str) -> None:
    for seed in range(60):
        size = 1 + (seed * 37) % 211
        flat = some_scores(kind, (1, size), seed).flatten()
        for count in {1, size, 1 + seed % size, size - seed % size}:
            expected = brute_force_unstructured(flat, count)
            assert _keep_by_sort(flat, count).tolist() == expected
            assert _keep_by_threshold(flat, count).tolist() == expected


def test_float16_and_strided_scores_select_the_same() -> None:
    scores = some_scores("quantised", (12, 10), 1)
    expected = prune_lowest(scores, 41)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(prune_lowest(scores.to(dtype), 41), expected)
    assert torch.equal(prune_lowest(scores.T.contiguous().T, 41), expected)
    assert torch.equal(prune_lowest(scores.clone().requires_grad_(), 41), expected)


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "block:2x2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_raise(spec: str, sparsity: float, value: float) -> None:
    scores = torch.ones(4, 8)
    scores[3, 6] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        parse_pattern(spec).mask(scores, sparsity, axis=1)


# -- N:M -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_n_of_m_equals_brute_force_along_either_axis(kind: str, n: int, m: int) -> None:
    pattern = parse_pattern(f"{n}:{m}")
    assert pattern.sparsity == 1 - n / m
    for seed in range(4):
        scores = some_scores(kind, (1 + seed * 2, m * (1 + seed)), seed)
        expected = [list(chain(*brute_force_groups(row, n, m))) for row in scores.tolist()]
        mask = pattern.mask(scores, pattern.sparsity, axis=1)
        assert mask.tolist() == expected
        assert mask.reshape(-1, m).sum(1).eq(n).all()
        stored_the_other_way = pattern.mask(scores.T.contiguous(), pattern.sparsity, axis=0)
        assert stored_the_other_way.T.tolist() == expected
        assert pattern.holds((mask * torch.rand(mask.shape)).numpy(), axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_n_of_m_on_the_way_switches_the_cheapest_groups(kind: str, n: int, m: int) -> None:
    pattern = parse_pattern(f"{n}:{m}")
    final = 1 - n / m
    for seed, part in enumerate([0.0, 0.01, 0.3, 0.5, 0.77, 0.999]):
        rows, per_row = 3, 5
        scores = some_scores(kind, (rows, per_row * m), seed)
        if kind == "continuous":
            scores = scores.mul(8).round().div(8)  # sums are exact, so that equal ones are equal in any order
        groups = [group for row in scores.tolist() for group in (row[i : i + m] for i in range(0, len(row), m))]
        stays = [keep for row in scores.tolist() for keep in brute_force_groups(row, n, m)]
        lost = [
            sum(score for score, kept in zip(group, keep, strict=True) if not kept)
            for group, keep in zip(groups, stays, strict=True)
        ]
        switched = lowest_first(lost)[: int(rows * per_row * (final * part / final))]
        expected = [keep if at in switched else [True] * m for at, keep in enumerate(stays)]
        mask = pattern.mask(scores, final * part, axis=1)
        assert mask.reshape(-1, m).tolist() == expected, (kind, n, m, part)
        assert int((~mask).sum()) == len(switched) * (m - n)
        assert torch.equal(pattern.mask(scores.T.contiguous(), final * part, axis=0), mask.T)


def test_n_of_m_grows_and_never_shrinks_with_sparsity() -> None:
    scores, pattern = some_scores("continuous", (8, 32), 0), parse_pattern("2:4")
    masks = [pattern.mask(scores, sparsity, axis=1) for sparsity in np.linspace(0, 0.5, 21)]
    assert masks[0].all()
    assert all(bool((~earlier | ~later).eq(~later).all()) for earlier, later in pairwise(masks))


def test_n_of_m_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(PatternError, match=r"Pattern 2:4 has sparsity 0\.5; 0\.6 was asked for"):
        parse_pattern("2:4").mask(torch.rand(4, 8), 0.6, axis=1)
    with pytest.raises(PatternError, match="6 weights along its input axis, which 4 does not divide"):
        parse_pattern("2:4").mask(torch.rand(8, 6), 0.5, axis=1)
    parse_pattern("2:4").mask(torch.rand(8, 6), 0.5, axis=0)


# -- blocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (4, 1), (2, 2), (3, 5), (4, 4)])
def test_blocks_equal_brute_force(kind: str, rows: int, columns: int) -> None:
    pattern = parse_pattern(f"block:{rows}x{columns}")
    for seed, sparsity in enumerate([0.0, 0.2, 0.5, 0.61, 0.95]):
        down, across = 3 + seed, 4
        scores = some_scores(kind, (down * rows, across * columns), seed).mul(8).round()  # means are exact
        means = [
            float(scores[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].sum() / (rows * columns))
            for i in range(down)
            for j in range(across)
        ]
        gone = set(lowest_first(means)[: int(down * across * sparsity)])
        mask = pattern.mask(scores, sparsity, axis=1)
        for i in range(scores.shape[0]):
            for j in range(scores.shape[1]):
                assert bool(mask[i, j]) == ((i // rows) * across + j // columns not in gone)
        assert torch.equal(pattern.mask(scores.T.contiguous(), sparsity, axis=0), mask.T)
        assert pattern.holds(mask.float().numpy(), axis=1)
        assert pattern.holds(mask.float().numpy().T, axis=0)


def test_a_block_with_a_hole_does_not_hold() -> None:
    weight = np.ones((4, 6), dtype=np.float32)
    weight[:2, 2:4] = 0
    assert parse_pattern("block:2x2").holds(weight, axis=1)
    assert not parse_pattern("block:2x3").holds(weight, axis=1)
    assert not parse_pattern("block:4x4").holds(weight, axis=1)  # tiles do not cover it
    assert not parse_pattern("block:2x2").holds(np.ones(4), axis=1)
    weight[3, 5] = 0
    assert not parse_pattern("block:2x2").holds(weight, axis=1)


def test_a_block_lies_as_outputs_by_inputs_in_either_storage() -> None:
    weight = np.ones((2, 8), dtype=np.float32)
    weight[0, :4] = 0
    assert parse_pattern("block:1x4").holds(weight, axis=1)
    assert parse_pattern("block:1x4").holds(weight.T, axis=0)
    assert not parse_pattern("block:2x1").holds(weight, axis=1)
    assert not parse_pattern("block:1x4").holds(np.ones((8, 2)), axis=1)


# -- holds and check -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_holds_counts_non_zeros_in_every_group(n: int, m: int) -> None:
    random = np.random.default_rng(n * 100 + m)
    pattern = parse_pattern(f"{n}:{m}")
    seen = set()
    for _ in range(60):
        weight = (random.random((2, m * 2)) < n / m).astype(np.float32) * random.choice([-1.0, 1.0], (2, m * 2))
        expected = all(
            sum(1 for value in row[start : start + m] if value != 0) <= n
            for row in weight.tolist()
            for start in range(0, m * 2, m)
        )
        seen.add(expected)
        assert pattern.holds(weight, axis=1) == expected
        assert pattern.holds(np.ascontiguousarray(weight.T), axis=0) == expected
    assert seen == {True, False}


def test_holds_looks_along_the_given_axis_only() -> None:
    weight = np.zeros((4, 8), dtype=np.float16)
    weight[:2] = 1  # two of four down each column, everything along the first rows
    pattern = parse_pattern("2:4")
    assert pattern.holds(weight, axis=0)
    assert not pattern.holds(weight, axis=1)
    assert not pattern.holds(weight[:, :6], axis=1)
    assert not pattern.holds(np.zeros(8), axis=0)
    assert pattern.holds(np.zeros((4, 8)), axis=1)
    assert parse_pattern("unstructured").holds(np.ones((3, 3)), axis=1)


def test_check_names_the_weight_and_looks_along_the_reduction_axis() -> None:
    with pytest.raises(PatternError, match=r"layer\.0\.query has 30 weights along its input axis, which 4 does not"):
        parse_pattern("2:4").check((32, 30), axis=1, name="layer.0.query")
    parse_pattern("2:4").check((32, 30), axis=0, name="layer.0.query")
    with pytest.raises(PatternError, match=r"c_fc has 30 outputs and 32 inputs, which tiles of 4x8 do not cover"):
        parse_pattern("block:4x8").check((32, 30), axis=0, name="c_fc")
    parse_pattern("block:4x5").check((30, 32), axis=0, name="c_fc")
    parse_pattern("unstructured").check((1, 1), axis=1, name="any")


# -- specs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "1:16", "63:64", "block:4x4", "block:1x2"])
def test_a_spec_comes_back_as_typed(spec: str) -> None:
    pattern = parse_pattern(spec)
    assert pattern.spec == spec
    assert parse_pattern(pattern.example).example == pattern.example


@pytest.mark.parametrize("spec", ["0:4", "4:4", "4:2", "0:0", "1:65", "block:1x1", "block:0x4", "block:4x0"])
def test_a_pattern_that_is_no_use_is_refused(spec: str) -> None:
    with pytest.raises(PatternError, match=f"Pattern '{spec}' is not usable"):
        parse_pattern(spec)


@pytest.mark.parametrize(
    "spec", ["foo", "", "2-4", " 2:4", "2:4:8", "-2:4", "block", "block:4", "Unstructured", "dense"]
)
def test_an_unknown_pattern_lists_the_known_ones(spec: str) -> None:
    with pytest.raises(
        PatternError, match=rf"Unknown pattern '{spec}'; use one of 2:4, block:4x4, structured, unstructured\."
    ):
        parse_pattern(spec)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_the_range_is_refused(sparsity: float) -> None:
    with pytest.raises(PatternError, match=r"outside \[0, 1\)"):
        check_sparsity(sparsity)
    for spec in ("unstructured", "2:4", "block:2x2"):
        with pytest.raises(PatternError, match=r"outside \[0, 1\)"):
            parse_pattern(spec).mask(torch.rand(4, 4), sparsity, axis=1)


def test_patterns_are_read_without_torch() -> None:
    """Inspecting files needs no torch: the pattern modules may not import it before a mask is asked for."""
    program = (
        "import sys, numpy; from pst.patterns import parse_pattern\n"
        "for spec in ('unstructured', '2:4', 'block:1x4'):\n"
        "    pattern = parse_pattern(spec); pattern.check((4, 4), axis=1, name='w')\n"
        "    assert pattern.holds(numpy.zeros((4, 4)), axis=1)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
