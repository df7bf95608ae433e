"""Timing several engines in turn, and what may be said from it.

One round times every engine once, so that a change of the machine's speed hits all alike, and a ratio is taken within
each round. Every second round goes backwards, A B C, C B A, A B C ..., because the place in a round is no matter of the
engine: in one order alone, two copies of one small model differ on a busy machine by which comes first. With several
engines, each timed inference follows one of the same engine that is not timed: caches and threads are then as warm as
in a server that runs this model alone. Percentiles interpolate linearly between the closest ranks: the p-th of n sorted
samples lies at rank p / 100 * (n - 1), counted from 0 (Hyndman and Fan's type 7, numpy's default).
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

UNIT = "ms"
CONFIDENCE = 0.95
EQUAL_WITHIN = 0.02
"""Ratios within this of 1 count as the same speed."""
BLOCKS = ((10, 2.262), (20, 2.093))
"""Numbers of blocks that rounds are cut into, with the 97.5% quantile of Student's t for as many less one."""
NORMAL = 1.960
"""The same quantile of the normal distribution."""
BLOCK_ROUNDS = 5
"""Shorter blocks do not show whether rounds depend on each other."""

Finding = Literal["faster", "slower", "same", "undecided"]


def percentile(samples: Sequence[float], p: float) -> float:
    """The *p*-th percentile (0 to 100) by linear interpolation between closest ranks."""
    ordered = sorted(samples)
    rank = p / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of each timed inference, in the order they were made, and the rows that each one held."""

    samples: tuple[float, ...]
    batch: int
    warmup: int
    """Inferences before the first sample, not among the samples."""
    first: float | None = None
    """Of the very first inference of this workload, one of the warm-up: what a runtime prepares for a new shape."""
    unit: str = field(default=UNIT, init=False)

    @property
    def p50(self) -> float:
        """Median."""
        return percentile(self.samples, 50)

    @property
    def p90(self) -> float:
        """90 of 100 inferences were at most this long."""
        return percentile(self.samples, 90)

    @property
    def p99(self) -> float:
        """99 of 100 inferences were at most this long; with fewer than 100 samples, close to the longest."""
        return percentile(self.samples, 99)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return math.fsum(self.samples) / len(self.samples)

    @property
    def std(self) -> float:
        """Standard deviation of the samples (divided by n)."""
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.samples) / len(self.samples))

    @property
    def throughput(self) -> float:
        """Rows per second at this batch size, one inference after the other."""
        return 1000 * self.batch / self.mean

    def to_json(self) -> dict[str, Any]:
        """Summary and raw samples."""
        numbers = {name: getattr(self, name) for name in ("p50", "p90", "p99", "mean", "std")}
        return {
            "unit": self.unit,
            "runs": len(self.samples),
            "warmup": self.warmup,
            "first": self.first,
            **numbers,
            "throughput_per_s": self.throughput,
            "samples": list(self.samples),
        }


class Rule(Protocol):
    """Says when to stop: see serve.bench.stopping.StopRule."""

    def reached(self, samples: Mapping[str, Sequence[float]], *, seconds: float) -> bool:
        """Whether the round just made, now the last of each engine's *samples* in ms, was the last."""
        ...


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What measure_in_turn found."""

    latencies: dict[str, Latency]
    seconds: float
    """From the beginning of the first round to the end of the last."""

    @property
    def samples(self) -> dict[str, tuple[float, ...]]:
        """Milliseconds by engine."""
        return {name: latency.samples for name, latency in self.latencies.items()}


def measure_in_turn(
    engines: Mapping[str, Callable[[int], object]],
    *,
    batch: int,
    warmup: int,
    rule: Rule,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], None] = lambda: None,
    around_warmup: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Timing:
    """Call every engine *warmup* times, then time rounds of one call each, as *rule* says.

    Each value of *engines* is called with the number of the round: with several engines twice, and the second call is
    timed. All engines get the same rounds, in the mapping's order and backwards by turns. The warm-up of an engine runs
    within *around_warmup* of its name.
    """
    first: dict[str, float] = {}
    for name, call in engines.items():
        with around_warmup(name):
            for index in range(warmup):
                start = clock()
                call(index)
                first.setdefault(name, (clock() - start) * 1000)
    samples: dict[str, list[float]] = {name: [] for name in engines}
    begin = clock()
    for index in itertools.count():
        for name, call in list(engines.items())[:: -1 if index % 2 else 1]:
            if len(engines) > 1:
                call(index)
            start = clock()
            call(index)
            samples[name].append((clock() - start) * 1000)
        on_round()
        seconds = clock() - begin
        if rule.reached(samples, seconds=seconds):
            break
    latencies = {
        name: Latency(samples=tuple(values), batch=batch, warmup=warmup, first=first.get(name))
        for name, values in samples.items()
    }
    return Timing(latencies=latencies, seconds=seconds)


def median_interval(
    samples: Sequence[float], *, confidence: float = CONFIDENCE, widened: float = 1.0
) -> tuple[float, float] | None:
    """An interval for the median from order statistics, which assumes nothing about the distribution's form.

    With B binomial (n, 1/2), the k-th smallest and k-th largest samples enclose the median with probability
    1 - 2 P(B < k); k is the largest for which that is at least *confidence*. None where n is too small for any.
    That takes independent samples; for others, *widened* is by how much further from the middle k lies.
    """
    n = len(samples)
    below, k = 0.0, 0
    while k < n // 2:
        below += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if 2 * below > 1 - confidence:
            break
        k += 1
    if k:
        k = math.floor(n / 2 - (n / 2 - k) * widened)
    if k < 1:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


def dependence(samples: Sequence[float]) -> float:
    """By how much an interval of the median is to be wider because samples in a row are alike; 1 or more.

    The samples become signs, below their median or above. Were they independent, the mean of a block of L signs would
    have the variance 1 / L; its variance over the blocks, times L, is what dependence adds (batch means: Heidelberger
    and Lewis, Quantile estimation in dependent sequences, 1984). BLOCKS are few, so that Student's t replaces the
    normal distribution, and the greater of two block lengths counts. 1 for too few samples to tell.
    """
    values = np.asarray(samples, dtype=np.float64)
    signs = np.where(values <= np.median(values), 1.0, -1.0) if values.size else values
    found = 1.0
    for blocks, quantile in BLOCKS:
        length = len(signs) // blocks
        if length >= BLOCK_ROUNDS:
            means = signs[: blocks * length].reshape(blocks, length).mean(axis=1)
            found = max(found, float(length * means.var(ddof=1)) * (quantile / NORMAL) ** 2)
    return math.sqrt(found)


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Baseline's time over the candidate's, per round: above 1, the candidate is faster."""

    ratio: float
    """Median of the rounds' ratios."""
    low: float | None
    high: float | None
    """95% interval of that median, rounds being alike or not; None where there were too few rounds for one."""
    rounds: int
    """Or openings, where artifacts were opened several times (compare_openings)."""

    @property
    def finding(self) -> Finding:
        """Faster or slower where the whole interval lies beyond EQUAL_WITHIN of 1, same where it lies within it."""
        if self.low is None or self.high is None:
            return "undecided"
        if self.low >= 1 + EQUAL_WITHIN:
            return "faster"
        if self.high <= 1 - EQUAL_WITHIN:
            return "slower"
        if self.low >= 1 - EQUAL_WITHIN and self.high <= 1 + EQUAL_WITHIN:
            return "same"
        return "undecided"

    def to_json(self) -> dict[str, Any]:
        """Ratio, interval and finding."""
        return {
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "confidence": CONFIDENCE,
            "rounds": self.rounds,
            "finding": self.finding,
        }


def compare_samples(baseline: Sequence[float], candidate: Sequence[float]) -> Speedup:
    """Ratios of the two, round by round. Both must come from one call of measure_in_turn."""
    ratios = [a / b for a, b in zip(baseline, candidate, strict=True)]
    interval = median_interval(ratios, widened=dependence(ratios))
    low, high = interval if interval is not None else (None, None)
    return Speedup(ratio=percentile(ratios, 50), low=low, high=high, rounds=len(ratios))


def compare_openings(baseline: Sequence[Sequence[float]], candidate: Sequence[Sequence[float]]) -> Speedup:
    """Ratios by opening: an opening's is the median of its rounds', and counts as one round.

    So the interval is that of the openings: two sessions of one file differ for as long as they live, which more
    rounds of the same two do not show.
    """
    ratios = [compare_samples(first, second).ratio for first, second in zip(baseline, candidate, strict=True)]
    return compare_samples(ratios, [1.0] * len(ratios))
