"""Timing several engines in turn, and what may be said from it.

One round times every engine once, A B C A B C ..., so that a change of the machine's speed hits all alike, and a ratio
is taken within each round. With several engines, each timed inference follows one of the same engine that is not timed:
caches and threads are then as warm as in a server that runs this model alone. Percentiles interpolate linearly between
the closest ranks: the p-th of n sorted samples lies at rank p / 100 * (n - 1), counted from 0 (Hyndman and Fan's type
7, numpy's default).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

UNIT = "ms"
CONFIDENCE = 0.95
EQUAL_WITHIN = 0.02
"""Ratios within this of 1 count as the same speed."""
MINIMUM_ROUNDS = 10

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
            **numbers,
            "throughput_per_s": self.throughput,
            "samples": list(self.samples),
        }


def measure_in_turn(
    engines: Mapping[str, Callable[[int], object]],
    *,
    batch: int,
    warmup: int,
    runs: int,
    budget_s: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Latency]:
    """Call every engine *warmup* times, then time *runs* rounds of one call each, in the mapping's order.

    Each value of *engines* is called with the number of the round: with several engines twice, and the second call is
    timed. Stops early once *budget_s* seconds of timed
    rounds are over, but never before MINIMUM_ROUNDS (or *runs*, if that is less); all engines get the same rounds.
    """
    for call in engines.values():
        for index in range(warmup):
            call(index)
    samples: dict[str, list[float]] = {name: [] for name in engines}
    begin = clock()
    for index in range(runs):
        for name, call in engines.items():
            if len(engines) > 1:
                call(index)
            start = clock()
            call(index)
            samples[name].append((clock() - start) * 1000)
        on_round()
        if index + 1 >= MINIMUM_ROUNDS and clock() - begin >= budget_s:
            break
    return {name: Latency(samples=tuple(values), batch=batch, warmup=warmup) for name, values in samples.items()}


def median_interval(samples: Sequence[float], *, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """An interval for the median from order statistics, which assumes nothing about the distribution's form.

    With B binomial (n, 1/2), the k-th smallest and k-th largest samples enclose the median with probability
    1 - 2 P(B < k); k is the largest for which that is at least *confidence*. None where n is too small for any.
    """
    n = len(samples)
    below, k = 0.0, 0
    while k < n // 2:
        below += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if 2 * below > 1 - confidence:
            break
        k += 1
    if k == 0:
        return None
    ordered = sorted(samples)
    return ordered[k - 1], ordered[n - k]


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """Baseline's time over the candidate's, per round: above 1, the candidate is faster."""

    ratio: float
    """Median of the rounds' ratios."""
    low: float | None
    high: float | None
    """95% interval of that median; None where there were too few rounds for one."""
    rounds: int

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


def compare(baseline: Latency, candidate: Latency) -> Speedup:
    """Ratios of the two, round by round. Both must come from one call of measure_in_turn."""
    ratios = [a / b for a, b in zip(baseline.samples, candidate.samples, strict=True)]
    interval = median_interval(ratios)
    low, high = interval if interval is not None else (None, None)
    return Speedup(ratio=percentile(ratios, 50), low=low, high=high, rounds=len(ratios))
