"""Radix selection and N:M against a sort, entry for entry, ties included."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from pst import kernels
from pst.kernels import selection
from pst.patterns import masks, parse_pattern
from pst.patterns._select import _keep_by_sort
from tests.pst.oracle import keep_n_of_m

LENGTHS = [1, 7, 8192, 8193, 20000]


def normal(count: int) -> Tensor:
    return torch.randn(count)


def tied(count: int) -> Tensor:
    """Few values, zeros of both signs among them."""
    found = torch.randint(-3, 4, (count,)).float() / 2
    return torch.where((found == 0) & (torch.rand(count) < 0.5), -0.0, found)


def wide(count: int) -> Tensor:
    """From subnormal to nearly the largest number."""
    return torch.randn(count) * 10.0 ** torch.randint(-42, 38, (count,)).float()


def equal(count: int) -> Tensor:
    return torch.full((count,), 0.25)


@pytest.mark.parametrize("draw", [normal, tied, wide, equal])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_selection_equals_a_stable_sort(draw: object, share: float, device: torch.device) -> None:
    assert callable(draw)
    pieces = [draw(length).to(device) for length in LENGTHS]
    counts = [int(length * share) for length in LENGTHS]
    segments = selection.Segments(LENGTHS, device)
    keep, bad = selection.keep_highest(torch.cat(pieces), segments, counts)
    assert not bad
    for mine, piece, count in zip(torch.split(keep, LENGTHS), pieces, counts, strict=True):
        assert int((~mine).sum()) == count
        expected = _keep_by_sort(piece, count) if count else torch.ones_like(piece, dtype=torch.bool)
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("change", "settled"),
    [
        (lambda flat: flat, 1),
        (lambda flat: flat * 1.001 + 1e-4 * torch.randn_like(flat), 1),
        (lambda flat: flat * 3.0, 0),
        (lambda flat: -flat, 0),
        (lambda flat: torch.full_like(flat, float(flat[8193])), 0),  # more ties than are listed
    ],
)
def test_a_second_selection_equals_a_stable_sort(change: Any, settled: int, device: torch.device) -> None:
    """Around the thresholds of the first, whether they are still near or not."""
    lengths = [8192, 20000, 70000]
    flat = torch.cat([normal(length).abs().to(device) for length in lengths])
    flat[100:104] = flat[100]
    segments = selection.Segments(lengths, device)
    counts = [0, 15000, 35000]
    selection.keep_highest(flat, segments, counts)
    flat = change(flat)
    keep, bad = selection.keep_highest(flat, segments, counts)
    assert not bad
    assert segments.settled == settled
    for mine, piece, count in zip(torch.split(keep, lengths), torch.split(flat, lengths), counts, strict=True):
        assert torch.equal(mine, _keep_by_sort(piece, count) if count else torch.ones_like(mine))
    flat[3] = math.nan  # where nothing goes
    assert selection.keep_highest(flat, segments, counts)[1]


def test_ties_at_a_threshold_that_is_near(device: torch.device) -> None:
    flat = torch.arange(6000.0, device=device)
    flat[1000:1600] = 1000.0
    segments = selection.Segments([6000], device)
    for count in (1300, 1301, 1299):
        keep, _ = selection.keep_highest(flat, segments, [count])
        assert torch.equal(keep, _keep_by_sort(flat, count))
    assert segments.settled == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_not_finite_is_told(value: float, count: int, device: torch.device) -> None:
    flat = torch.randn(20).to(device)
    flat[13] = value
    assert selection.keep_highest(flat, selection.Segments([10, 10], device), [3, count])[1]
    _, bad, _ = selection.keep_n_of_m(flat, 2, 4, lost=False)
    assert int(bad) != 0


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (7, 64), (1, 2)])
def test_n_of_m_equals_a_sort_of_each_group(n: int, m: int, device: torch.device) -> None:
    scores = torch.randn(11 * m).to(device)
    keep, bad, lost = selection.keep_n_of_m(scores, n, m, lost=True)
    assert int(bad) == 0
    assert torch.equal(keep, keep_n_of_m(scores, n, m).bool())
    assert lost is not None
    torch.testing.assert_close(lost, scores.masked_fill(keep, 0.0).view(-1, m).sum(1))


@pytest.mark.parametrize("spec", ["unstructured", "2:4", "1:4", "4:8", "block:4x4", "block:1x8"])
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_masks_of_many_matrices_are_those_of_each(spec: str, share: float, device: torch.device) -> None:
    """The whole way of a pattern with the kernels, and without them; few values, so that ties decide."""
    pattern = parse_pattern(spec)
    scores = [tied(n * k).view(n, k).to(device) for n, k in [(8, 16), (24, 8), (64, 40)]]
    sparsity = share * (pattern.sparsity or 0.9)
    with kernels.forced(True):
        together = masks(pattern, scores, [sparsity] * 3)
    with kernels.forced(False):
        alone = [pattern.mask(each, sparsity, axis=1) for each in scores]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_scores_in_one_piece_are_not_copied(device: torch.device) -> None:
    from pst.patterns._select import _flat

    flat = torch.arange(48.0, device=device)
    pieces = [flat[:24].view(4, 6), flat[24:].view(6, 4)]
    assert _flat(pieces).data_ptr() == flat.data_ptr()
    assert torch.equal(_flat(pieces), flat)
    assert torch.equal(_flat(pieces[::-1]), torch.cat([flat[24:], flat[:24]]))
    assert torch.equal(_flat([pieces[0].T, pieces[1]]), torch.cat([flat[:24].view(4, 6).T.reshape(-1), flat[24:]]))
