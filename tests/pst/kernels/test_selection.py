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
    assert bad.tolist() == [0] * len(LENGTHS)
    assert segments.missed.tolist() == [int(count > 0) for count in counts]  # there is no threshold to begin with
    for mine, piece, count in zip(torch.split(keep, LENGTHS), pieces, counts, strict=True):
        assert int((~mine).sum()) == count
        expected = _keep_by_sort(piece, count) if count else torch.ones_like(piece, dtype=torch.bool)
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        (lambda flat: flat, [0, 0, 0]),
        (lambda flat: flat * 1.001 + 1e-4 * torch.randn_like(flat), [0, 0, 0]),
        (lambda flat: flat * 3.0, [0, 1, 1]),
        (lambda flat: -flat, [0, 1, 1]),
        (lambda flat: torch.full_like(flat, float(flat[8193])), [0, 1, 1]),  # more ties than are listed
        (lambda flat: torch.cat([flat[:28192], flat[28192:] * 3.0]), [0, 0, 1]),  # one of several
        (lambda flat: torch.cat([flat[:8192], flat[8192:28192] * 0.1, flat[28192:]]), [0, 1, 0]),
    ],
)
def test_a_second_selection_equals_a_stable_sort(change: Any, missed: list[int], device: torch.device) -> None:
    """Around the thresholds of the first, whether they are still near or not."""
    lengths = [8192, 20000, 70000]
    flat = torch.cat([normal(length).abs().to(device) for length in lengths])
    flat[100:104] = flat[100]
    segments = selection.Segments(lengths, device)
    counts = [0, 15000, 35000]
    selection.keep_highest(flat, segments, counts)
    before = segments.missed.clone()
    flat = change(flat)
    keep, bad = selection.keep_highest(flat, segments, counts)
    assert bad.tolist() == [0, 0, 0]
    assert (segments.missed - before).tolist() == missed
    for mine, piece, count in zip(torch.split(keep, lengths), torch.split(flat, lengths), counts, strict=True):
        assert torch.equal(mine, _keep_by_sort(piece, count) if count else torch.ones_like(mine))
    flat[3] = math.nan  # where nothing goes
    keep, bad = selection.keep_highest(flat, segments, counts)
    assert [bool(one) for one in bad] == [True, False, False]
    assert bool(keep[:8192].all())


def test_ties_at_a_threshold_that_is_near(device: torch.device) -> None:
    flat = torch.arange(6000.0, device=device)
    flat[1000:1600] = 1000.0
    segments = selection.Segments([6000], device)
    for count in (1300, 1301, 1299):
        keep, _ = selection.keep_highest(flat, segments, [count])
        assert torch.equal(keep, _keep_by_sort(flat, count))
    assert segments.missed.tolist() == [1]  # the first time


def test_counts_may_change_from_call_to_call(device: torch.device) -> None:
    """What a call begins with is kept for the next, which must neither find it changed nor get another's."""
    flat = normal(9000).to(device)
    segments = selection.Segments([4000, 5000], device)
    for counts in ([2000, 1000], [2000, 1000], [0, 4999], [2000, 1000], [4000, 0]):
        keep, _ = selection.keep_highest(flat, segments, counts)
        assert [int((~piece).sum()) for piece in torch.split(keep, [4000, 5000])] == counts


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_what_is_not_finite_is_told(value: float, count: int, device: torch.device) -> None:
    flat = torch.randn(20).to(device)
    flat[13] = value
    segments = selection.Segments([10, 10], device)
    for _ in range(2):  # without a threshold of a call before, and with one
        _, bad = selection.keep_highest(flat, segments, [3, count])
        assert [bool(one) for one in bad] == [False, True]


def test_nm_tells_in_which_segments_scores_are_not_finite(device: torch.device) -> None:
    """Several segments lie in one program's scores, and one in those of several programs."""
    lengths = [8, 4, 5000, 12, 1000]
    segments = selection.Segments(lengths, device)
    for broken in ([], [0], [1], [2], [4], [1, 3], [0, 2, 4]):
        flat = torch.randn(sum(lengths)).to(device)
        pieces = torch.split(flat, lengths)
        for place in broken:
            pieces[place][-1] = math.nan
        _, bad, _ = selection.keep_n_of_m(flat, segments, 2, 4, lost=False)
        assert [place for place, one in enumerate(bad.tolist()) if one] == broken


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (7, 64), (1, 2)])
def test_n_of_m_equals_a_sort_of_each_group(n: int, m: int, device: torch.device) -> None:
    scores = torch.randn(11 * m).to(device)
    segments = selection.Segments([3 * m, 8 * m], device)
    keep, bad, lost = selection.keep_n_of_m(scores, segments, n, m, lost=True)
    assert bad.tolist() == [0, 0]
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
        together, bad = masks(pattern, scores, [sparsity] * 3)
    assert bad is not None
    assert bad.tolist() == [0, 0, 0]
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
