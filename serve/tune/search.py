"""Which candidate is fastest: a search that drops the slow ones early, and a choice on samples of its own.

The search times all candidates in turn, FIRST_ROUNDS rounds, then twice as many and so on. After each, candidates that
are clearly slower than the one with the least median are out, so that the rest of the time goes to the close ones (a
race, as in Maron and Moore, Hoeffding races, 1993, with the interval of serve.bench.timing in place of Hoeffding's).

Who looks best among many is partly lucky, so that its ratio in the search promises too much. The choice therefore rests
on new samples of few finalists: the reference, the fastest dense candidate and the fastest other one. What is not dense
is chosen where it is faster than every dense finalist (the whole interval above 1 + EQUAL_WITHIN), else dense is kept.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from serve.bench.stopping import StopRule
from serve.bench.timing import Speedup, compare_samples, measure_in_turn, percentile

FIRST_ROUNDS = 12
"""The first in number that still have an interval which one outlier at each end does not set."""

Samples = Mapping[str, Sequence[float]]
"""Milliseconds by candidate; those of one place were measured in one round."""
Compare = Callable[[str, str], Speedup]
"""The first's time over the second's."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the search found at one workload."""

    samples: dict[str, tuple[float, ...]]
    """Of a candidate that is out, of the rounds until then."""
    left: tuple[str, ...]
    seconds: float

    def compare(self, first: str, second: str) -> Speedup:
        """Over the rounds that both took part in."""
        return compare_shared(self.samples, first, second)

    def fastest(self, names: Collection[str]) -> str | None:
        """Of those that are left, by the median; None where none of *names* is."""
        return _fastest(self.samples, [name for name in self.left if name in names])


def compare_shared(samples: Samples, first: str, second: str) -> Speedup:
    """Over the rounds that both have, which are the first ones."""
    shared = min(len(samples[first]), len(samples[second]))
    return compare_samples(samples[first][:shared], samples[second][:shared])


def search(
    calls: Mapping[str, Callable[[int], object]],
    *,
    dense: Collection[str],
    batch: int,
    warmup: int,
    runs: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Search:
    """Time *calls* in turn, up to *runs* rounds or *budget_s* seconds, or until nobody is left to drop.

    The fastest of *dense* stays, however slow. *warmup*: inferences of each before the first round.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    left, rounds, seconds = list(calls), 0, 0.0
    size = min(FIRST_ROUNDS, runs)
    while True:
        rule = StopRule(runs=size, precision=0.0, budget_s=max(0.0, budget_s - seconds))
        timing = measure_in_turn(
            {name: calls[name] for name in left},
            batch=batch,
            warmup=0 if rounds else warmup,
            rule=rule,
            clock=clock,
        )
        for name, measured in timing.samples.items():
            samples[name] += measured
        rounds, seconds = rounds + size, seconds + timing.seconds
        left = _still_in(samples, left, dense)
        if len(left) < 2 or rounds >= runs or rule.reason == "budget" or seconds >= budget_s:
            break
        size = min(rounds, runs - rounds)
    return Search(samples={name: tuple(values) for name, values in samples.items()}, left=tuple(left), seconds=seconds)


def _still_in(samples: Samples, left: Sequence[str], dense: Collection[str]) -> list[str]:
    leader, kept = _fastest(samples, left), _fastest(samples, [name for name in left if name in dense])
    assert leader is not None
    return [name for name in left if name == kept or compare_shared(samples, leader, name).finding != "slower"]


def _fastest(samples: Samples, names: Sequence[str]) -> str | None:
    return min(names, key=lambda name: percentile(samples[name], 50), default=None)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Who is chosen, and what it was measured against."""

    chosen: str
    dense: str
    """The dense candidate that is kept, or would have been."""


def choose(
    finalists: Sequence[str],
    *,
    dense: Collection[str],
    reference: str,
    compare: Compare,
    is_allowed: Callable[[str, str], bool] | None = None,
) -> Choice:
    """The fastest of *finalists*, where that is proved, else a dense one; the *reference* unless another is faster.

    *compare* has to rest on samples that did not choose the finalists. *is_allowed*, asked with a dense candidate and
    the one that would replace it, may forbid what is faster on the whole and slower somewhere.
    """
    allowed = is_allowed or (lambda before, after: True)
    denses = [name for name in finalists if name in dense]

    def beats(name: str, before: str) -> bool:
        return compare(before, name).finding == "faster" and allowed(before, name)

    kept = reference
    for name in denses:
        if name != reference and beats(name, reference) and (kept == reference or compare(kept, name).ratio > 1):
            kept = name
    able = [name for name in finalists if name not in dense and all(beats(name, each) for each in denses)]
    return Choice(chosen=max(able, key=lambda name: compare(kept, name).ratio, default=kept), dense=kept)
