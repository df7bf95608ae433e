"""Exact selection with a stated rule for ties, the same on every device.

On a GPU, many tensors of float32 are served together by pst/kernels/selection.py.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pst.kernels.selection import Segments

NOT_FINITE = "scores hold NaN or infinity"


def prune_lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the shape of *scores* in which exactly *count* entries, those of the lowest scores, are False.

    Ties: among equal scores the entry with the lower flat (row-major) index stays.
    Raises ValueError when a score is not finite: an order over NaN would be silent nonsense.
    """
    flat = scores.detach().reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(NOT_FINITE)
    if count <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        keep = _keep_by_threshold(flat, count)
    else:
        keep = _keep_by_sort(flat, count)
    return keep.reshape(scores.shape)


def prune_lowest_each(scores: Sequence[Tensor], counts: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
    """``prune_lowest`` of each of *scores*, all on one device, with its count.

    Where a GPU serves them together, nothing waits for it: instead of raising ValueError, the second result, (scores,)
    int32 there, is not 0 for scores that are not finite, whose masks mean nothing. It is None where all were looked at.
    """
    if not _together(scores):
        return [prune_lowest(each, count) for each, count in zip(scores, counts, strict=True)], None
    from pst.kernels import selection

    keep, bad = selection.keep_highest(_flat(scores), _segments(scores), counts)
    return _like(keep, scores), bad


def keep_n_of_m(
    scores: Sequence[Tensor], n: int, m: int, switched: Sequence[int]
) -> tuple[list[Tensor], Tensor | None]:
    """Masks of *scores* (rows, a multiple of m): *switched* groups of each keep *n* of *m*, the others everything.

    The n highest scores of a group stay, of equal ones those of lower index. The groups that lose the smallest sum of
    scores are the ones that are switched, of equal ones those of higher index. The second result, and ValueError, are
    those of prune_lowest_each.
    """
    if not _together(scores):
        return [_keep_n_of_m(each.detach(), n, m, count) for each, count in zip(scores, switched, strict=True)], None
    from pst.kernels import selection

    ramp = any(count < each.numel() // m for each, count in zip(scores, switched, strict=True))
    keep, bad, lost = selection.keep_n_of_m(_flat(scores), _segments(scores), n, m, lost=ramp)
    if lost is not None:
        dense, _ = selection.keep_highest(lost, _segments([each[:, ::m] for each in scores]), switched)
        keep.view(-1, m).logical_or_(dense.unsqueeze(1))
    return _like(keep, scores), bad


def require_finite(bad: Tensor | None) -> None:
    """Raise ValueError where the second result of the functions above says that scores are not finite; waits for it."""
    if bad is not None and bool(bad.any()):
        raise ValueError(NOT_FINITE)


def _together(scores: Sequence[Tensor]) -> bool:
    from pst import kernels

    return kernels.usable(scores[0].device) and all(each.dtype == torch.float32 for each in scores)


def _flat(scores: Sequence[Tensor]) -> Tensor:
    """All of *scores*, one behind the other; without a copy where they lie so."""
    first = scores[0].detach()
    offset, total = first.storage_offset(), sum(each.numel() for each in scores)
    storage = first.untyped_storage().data_ptr()
    at = offset
    for each in scores:
        here = each.untyped_storage().data_ptr() == storage and each.storage_offset() == at and each.is_contiguous()
        if not here:
            return torch.cat([each.detach().reshape(-1) for each in scores])
        at += each.numel()
    return first.as_strided((total,), (1,), offset)


def _like(flat: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(flat, [each.numel() for each in scores])
    return [piece.view(each.shape) for piece, each in zip(pieces, scores, strict=True)]


def _segments(scores: Sequence[Tensor]) -> "Segments":
    return _segments_of(tuple(each.numel() for each in scores), scores[0].device)


@lru_cache(maxsize=32)
def _segments_of(lengths: tuple[int, ...], device: torch.device) -> "Segments":
    from pst.kernels.selection import Segments

    return Segments(lengths, device)


def _keep_by_threshold(flat: Tensor, count: int) -> Tensor:
    """For the CPU, where numpy's introselect is five times as fast as torch's and twenty times as fast as a sort."""
    threshold = float(np.partition(flat.numpy(), count - 1)[count - 1])
    pruned = flat < threshold
    tied = flat == threshold
    missing = count - int(pruned.sum())  # at least 1: the threshold itself is the count-th lowest score
    total = int(tied.sum())
    if missing == total:
        pruned |= tied
    else:  # the last `missing` of the tied entries go
        pruned |= tied & (torch.cumsum(tied, 0) > total - missing)
    return pruned.logical_not_()


def _keep_by_sort(flat: Tensor, count: int) -> Tensor:
    """For other dtypes, and for a GPU without Triton: far faster than torch's kthvalue there, which is one block."""
    last_first = torch.sort(flat.flip(0), stable=True).indices  # of equal scores, the last index comes first
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.numel() - 1 - last_first[:count]] = False
    return keep


def _keep_n_of_m(scores: Tensor, n: int, m: int, switched: int) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(NOT_FINITE)
    groups = scores.reshape(scores.shape[0], -1, m)  # (n, k / M, M)
    keep = _rank(groups) < n
    if switched < keep[..., 0].numel():
        lost = torch.where(keep, torch.zeros_like(groups), groups).sum(-1)  # (n, k / M)
        keep |= prune_lowest(lost, switched).unsqueeze(-1)
    return keep.reshape(scores.shape)


def _rank(groups: Tensor) -> Tensor:
    """Position of each entry in its group's descending order, (..., M) int8; of equal entries the first ranks higher.

    m * (m - 1) comparisons beat a sort of many tiny groups, and give the same answer on every device.
    """
    m = groups.shape[-1]
    rank = torch.zeros_like(groups, dtype=torch.int8)
    for i in range(m):
        for j in range(m):
            if j != i:
                ahead = groups[..., j] >= groups[..., i] if j < i else groups[..., j] > groups[..., i]
                rank[..., i] += ahead
    return rank
