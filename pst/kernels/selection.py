# mypy: disable-error-code="no-untyped-def, misc, no-untyped-call, untyped-decorator"
"""Exact selection in many matrices at once: radix selection instead of a sort, and N:M within registers.

The scores of all matrices lie one behind the other. Read as an unsigned integer KEY whose order is theirs, the count-th
lowest score of a segment is found one byte a pass, from the highest: each pass counts, among the keys that share the
bytes found so far, how many have which next byte. Where only some of the entries that are equal to it have to go, the
same search over their indices settles which: the lower ones stay, so the count is exact.

Training moves a threshold little from one step to the next. So the scores are read once first, around the threshold of
the call before: what lies below the window is counted, what lies inside is listed, and where the threshold is among the
listed it is found there, by key and index at once. Where it is not, the search above follows.

The processor decides nothing and waits for nothing. It always starts the search, of few programs that go from span to
span, and that end at once when the GPU has found every threshold. Whether a score is not finite stays on the GPU, too.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pst.pending import moved

SPAN = 2048
"""Scores that are counted together."""
PROGRAMS = 8
"""Of the search, a multiprocessor."""
WINDOW = tl.constexpr(1 << 16)
"""Keys around the last threshold that are listed: 0.4 to 0.8% of a float32 to either side."""
ROOM = 64
"""One in so many scores can be listed, and 4,096 in any case."""
CHUNK = 2048
"""Listed entries that are looked at together."""
STATE = tl.constexpr(4)
"""Of each segment, int64: key found so far, entries still to go, place counted from the end up
to which ties go, settled (2: nothing goes)."""


@triton.jit
def _key(score):
    """uint32 in the order of float32; -0.0 equals 0.0."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return tl.where(bits < 0, bits ^ -1, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _load(scores, begin, length, start, SPAN: tl.constexpr):
    """SPAN scores of a segment from its index *start* on, their indices, and which of them there are."""
    at = start + tl.arange(0, SPAN)
    inside = at < length
    return tl.load(scores + begin + at, mask=inside, other=0.0), at, inside


@triton.jit
def _count_kernel(
    scores, segments, starts, offsets, spans, state, flags, counts, SHIFT: tl.constexpr, TIES: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Add to counts (segments, 256) how many keys have which byte at SHIFT, of those still in question.

    TIES: the entries are those that have the key found, and their keys the places counted from the segment's end.
    """
    if tl.load(flags) != 0:
        for span in range(tl.program_id(0), spans, tl.num_programs(0)):
            segment = tl.load(segments + span)
            if tl.load(state + segment * STATE + 3) == 0:
                begin = tl.load(offsets + segment)
                length = (tl.load(offsets + segment + 1) - begin).to(tl.int32)
                score, at, inside = _load(scores, begin, length, tl.load(starts + span), SPAN)
                key = _key(score)
                found = tl.load(state + segment * STATE).to(tl.uint32)
                if TIES:
                    inside = inside & (key == found)
                    key = (length - 1 - at).to(tl.uint32)
                    found = tl.load(state + segment * STATE + 2).to(tl.uint32)
                if SHIFT < 24:
                    inside = inside & ((key >> (SHIFT + 8)) == (found >> (SHIFT + 8)))
                digit = ((key >> SHIFT) & 255).to(tl.int32)
                if SHIFT >= 16 and not TIES:
                    histogram = tl.histogram(digit, 256, mask=inside)
                    bins = tl.arange(0, 256)
                    tl.atomic_add(counts + segment * 256 + bins, histogram, mask=histogram > 0, sem="relaxed")
                else:  # few are left
                    tl.atomic_add(counts + segment * 256 + digit, 1, mask=inside, sem="relaxed")


@triton.jit
def _choose_kernel(state, counts, SHIFT: tl.constexpr, TIES: tl.constexpr):
    """The byte at SHIFT of the count-th lowest key of one segment; the counts go back to zero."""
    segment = tl.program_id(0)
    row = state + segment * STATE
    if tl.load(row + 3) == 0:
        bins = tl.arange(0, 256)
        count = tl.load(counts + segment * 256 + bins)
        tl.store(counts + segment * 256 + bins, tl.zeros_like(count))
        wanted = tl.load(row + 1)
        digit = tl.sum((tl.cumsum(count, 0) < wanted).to(tl.int32), 0)
        left = wanted - tl.sum(tl.where(bins < digit, count, 0), 0)
        field = 2 if TIES else 0
        tl.store(row + field, tl.load(row + field) + (digit.to(tl.int64) << SHIFT))
        tl.store(row + 1, left)
        if SHIFT == 0:
            if TIES:
                tl.store(row + 3, 1)
            elif left == tl.sum(tl.where(bins == digit, count, 0), 0):  # all that are equal go
                tl.store(row + 2, 2147483647)
                tl.store(row + 3, 1)


@triton.jit
def _window_kernel(
    scores, segments, starts, offsets, lows, rooms, counted, listed, flags, SPAN: tl.constexpr,
):  # fmt: skip
    """counted (segments, 2): keys below the window from lows[segment] on, and inside; listed: the latter, as

    (key - low) << 32 | place counted from the segment's end: in the order in which they go, no two alike.
    flags[1 + segment]: a score is not finite.
    """
    program = tl.program_id(0)
    segment = tl.load(segments + program)
    begin = tl.load(offsets + segment)
    length = (tl.load(offsets + segment + 1) - begin).to(tl.int32)
    score, at, inside = _load(scores, begin, length, tl.load(starts + program), SPAN)
    finite = tl.abs(score) < float("inf")  # False for NaN
    if tl.sum((inside & (finite == 0)).to(tl.int32)) > 0:
        tl.store(flags + 1 + segment, 1)
    key, low = _key(score), tl.load(lows + segment).to(tl.uint32)
    near = inside & (key >= low) & (key - low < WINDOW)
    tl.atomic_add(counted + segment * 2, tl.sum((inside & (key < low)).to(tl.int32)), sem="relaxed")
    number = tl.sum(near.to(tl.int32))
    if number > 0:
        place = tl.atomic_add(counted + segment * 2 + 1, number, sem="relaxed")
        slot = place + tl.cumsum(near.to(tl.int32), 0) - 1
        room = tl.load(rooms + segment)
        fits = near & (slot < tl.load(rooms + segment + 1) - room)
        entry = ((key - low).to(tl.int64) << 32) | (length - 1 - at).to(tl.int64)
        tl.store(listed + room + slot, entry, mask=fits)


@triton.jit
def _settle_kernel(state, lows, rooms, counted, listed, flags, missed, CHUNK: tl.constexpr):
    """Settle a segment whose threshold is listed; else flags[0], and one more of missed (segments,)."""
    segment = tl.program_id(0)
    row = state + segment * STATE
    if tl.load(row + 3) == 0:
        room = tl.load(rooms + segment)
        left = tl.load(row + 1) - tl.load(counted + segment * 2)
        near = tl.load(counted + segment * 2 + 1)
        if (left < 1) | (left > near) | (near > tl.load(rooms + segment + 1) - room):
            tl.store(flags, 1)
            tl.store(missed + segment, tl.load(missed + segment) + 1)
        else:
            bins, found = tl.arange(0, 256), left * 0
            for step in tl.static_range(7):
                shift = 48 - 8 * step
                count = tl.zeros((256,), tl.int32)
                for start in range(0, near, CHUNK):
                    at = start + tl.arange(0, CHUNK)
                    entry = tl.load(listed + room + at, mask=at < near, other=0)
                    alike = (at < near) & ((entry >> (shift + 8)) == (found >> (shift + 8)))
                    count += tl.histogram(((entry >> shift) & 255).to(tl.int32), 256, mask=alike)
                digit = tl.sum((tl.cumsum(count, 0) < left).to(tl.int32), 0)
                left -= tl.sum(tl.where(bins < digit, count, 0), 0)
                found += digit.to(tl.int64) << shift
            tl.store(row, tl.load(lows + segment) + (found >> 32))
            tl.store(row + 2, found & 0x7FFFFFFF)
            tl.store(row + 3, 1)


@triton.jit
def _keep_kernel(scores, segments, starts, offsets, state, keep, SPAN: tl.constexpr):
    program = tl.program_id(0)
    segment = tl.load(segments + program)
    begin = tl.load(offsets + segment)
    length = (tl.load(offsets + segment + 1) - begin).to(tl.int32)
    score, at, inside = _load(scores, begin, length, tl.load(starts + program), SPAN)
    key = _key(score)
    found, last = tl.load(state + segment * STATE).to(tl.uint32), tl.load(state + segment * STATE + 2).to(tl.int32)
    nothing = tl.load(state + segment * STATE + 3) == 2
    goes = (key < found) | ((key == found) & (length - 1 - at <= last))
    tl.store(keep + begin + at, (nothing | (goes == 0)).to(tl.int8), mask=inside)


@triton.jit
def _n_of_m_kernel(
    scores, offsets, segments, keep, lost, bad, groups, N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr,
    GROUPS: tl.constexpr, LOST: tl.constexpr,
):  # fmt: skip
    """keep: the N highest of every M scores, of equal ones the first; lost: the sum of the others.

    bad (segments,): a score of the segment is not finite.
    """
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    member = tl.arange(0, PADDED)
    at = group[:, None] * M + member[None, :]
    inside = (group[:, None] < groups) & (member[None, :] < M)
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    finite = tl.abs(score) < float("inf")
    wrong = inside & (finite == 0)
    if tl.sum(tl.where(wrong, 1, 0)) > 0:
        for segment in range(segments):
            here = (at >= tl.load(offsets + segment)) & (at < tl.load(offsets + segment + 1))
            if tl.sum(tl.where(wrong & here, 1, 0)) > 0:
                tl.store(bad + segment, 1)
    higher = score[:, None, :] > score[:, :, None]
    ahead = (score[:, None, :] == score[:, :, None]) & (member[None, None, :] < member[None, :, None])
    rank = tl.sum((higher | ahead).to(tl.int32), 2)
    kept = rank < N
    tl.store(keep + at, kept.to(tl.int8), mask=inside)
    if LOST:
        gone = tl.sum(tl.where(inside & (kept == 0), score, 0.0), 1)
        tl.store(lost + group, gone, mask=group < groups)


class Segments:
    """Where the segments of a flat tensor lie, as tables; made once for the same lengths."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """For segments of *lengths*, one behind the other."""
        self.lengths, self.device = list(lengths), device
        offsets, segments, starts = [0], list[int](), list[int]()
        for segment, length in enumerate(lengths):
            segments += [segment] * len(range(0, length, SPAN))
            starts += range(0, length, SPAN)
            offsets.append(offsets[-1] + length)
        self.total, self.spans = offsets[-1], len(segments)
        self.offsets = torch.tensor(offsets, dtype=torch.int64).to(device)
        self.segments = torch.tensor(segments, dtype=torch.int32).to(device)
        self.starts = torch.tensor(starts, dtype=torch.int32).to(device)
        rooms = itertools.accumulate((min(length, max(4096, length // ROOM)) for length in lengths), initial=0)
        self.rooms = torch.tensor(list(rooms), dtype=torch.int64).to(device)
        self.room = int(self.rooms[-1])
        self.programs = min(self.spans, _most_programs(device))
        """Of the search."""
        self.thresholds = torch.zeros(len(lengths), dtype=torch.int64, device=device)
        """Key of each segment's last threshold: a guess, which changes the time and no result. First a key of NaN."""
        self.missed = torch.zeros(len(lengths), dtype=torch.int32, device=device)
        """How often each segment's threshold did not lie in the window, so that it was searched for."""
        self._begin: tuple[list[int], Tensor] | None = None

    def begin(self, counts: Sequence[int]) -> Tensor:
        """STATE of each segment before *counts* of its entries go, (segments, 4) int64, a new tensor."""
        if self._begin is None or self._begin[0] != list(counts):
            rows = [[0, count, 0, 0 if count > 0 else 2] for count in counts]
            self._begin = list(counts), moved(torch.tensor(rows, dtype=torch.int64), self.device)
        return self._begin[1].clone()


def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter runs one after the other
    return PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def keep_highest(flat: Tensor, segments: Segments, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Masks in which exactly counts[i] entries of segment i, those of its lowest scores, are False.

    flat: (segments.total,) float32. Returns the masks, (segments.total,) bool, and (segments,) int32, not 0 where a
    score is NaN or infinite, so that the masks mean nothing. Of equal scores the lower index stays.
    """
    device, number = flat.device, len(segments.lengths)
    state = segments.begin(counts)
    keep = torch.empty(segments.total, dtype=torch.bool, device=device)
    where = (flat, segments.segments, segments.starts, segments.offsets)
    grid = (segments.spans,)
    flags = torch.zeros(1 + number, dtype=torch.int32, device=device)  # one is not settled; each: one is not finite
    lows = (segments.thresholds - WINDOW.value // 2).clamp_(0, 2**32 - WINDOW.value)
    counted = torch.zeros(number * 2, dtype=torch.int32, device=device)
    listed = torch.empty(segments.room, dtype=torch.int64, device=device)
    _window_kernel[grid](*where, lows, segments.rooms, counted, listed, flags, SPAN)
    _settle_kernel[(number,)](state, lows, segments.rooms, counted, listed, flags, segments.missed, CHUNK)
    bins = torch.zeros(number * 256, dtype=torch.int32, device=device)
    for ties in (False, True):
        for shift in (24, 16, 8, 0):
            _count_kernel[(segments.programs,)](*where, segments.spans, state, flags, bins, shift, ties, SPAN)
            _choose_kernel[(number,)](state, bins, shift, ties)
    _keep_kernel[grid](*where, state, keep, SPAN)
    segments.thresholds = state[:, 0]
    return keep, flags[1:]


def keep_n_of_m(
    flat: Tensor, segments: Segments, n: int, m: int, *, lost: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The masks that keep the *n* highest of every *m* consecutive scores; of equal ones the first stays.

    flat: (segments.total,) float32, m of which make a group. Returns masks of its shape, bool; (segments,) int32, not
    0 where a score is not finite; and, if *lost*, the sum of the scores that each group loses, (groups,) float32.
    """
    groups = flat.numel() // m
    padded = 1 << (m - 1).bit_length()
    at_once = max(1, 4096 // padded**2)
    number = len(segments.lengths)
    keep = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    bad = torch.zeros(number, dtype=torch.int32, device=flat.device)
    gone = torch.empty(groups if lost else 1, dtype=torch.float32, device=flat.device)
    _n_of_m_kernel[(triton.cdiv(groups, at_once),)](
        flat, segments.offsets, number, keep, gone, bad, groups, n, m, padded, at_once, lost
    )
    return keep, bad, gone if lost else None
