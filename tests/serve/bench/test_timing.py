"""Percentiles against numpy, the order of measuring, and what may be concluded."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from serve.bench.stopping import MINIMUM_ROUNDS, StopRule
from serve.bench.timing import (
    Latency,
    Speedup,
    compare_openings,
    compare_samples,
    dependence,
    measure_in_turn,
    median_interval,
    percentile,
)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 1000])
def test_percentiles_equal_numpys(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    for p in (0, 1, 25, 50, 90, 99, 99.9, 100):
        assert percentile(samples.tolist(), p) == pytest.approx(float(np.percentile(samples, p)), rel=1e-12)


def test_latency_summary_equals_numpys() -> None:
    samples = np.random.default_rng(0).lognormal(size=137)
    latency = Latency(samples=tuple(samples.tolist()), batch=8, warmup=3)
    assert latency.unit == "ms"
    assert latency.mean == pytest.approx(samples.mean())
    assert latency.std == pytest.approx(samples.std())
    assert latency.throughput == pytest.approx(8 / (samples.mean() / 1000))
    content = latency.to_json()
    assert (content["p50"], content["runs"], content["warmup"]) == (latency.p50, 137, 3)
    assert content["samples"] == samples.tolist()
    assert latency.p50 <= latency.p90 <= latency.p99


class FakeClock:
    """Time that passes only inside the engines."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def engine(self, name: str, seconds: float) -> Callable[[int], None]:
        def call(index: int) -> None:
            self.calls.append((name, index))
            self.now += seconds

        return call


def rounds_of(runs: int, *, budget_s: float = math.inf) -> StopRule:
    return StopRule(runs=runs, precision=0, budget_s=budget_s)


def test_engines_are_measured_in_turn() -> None:
    clock = FakeClock()
    engines = {"a": clock.engine("a", 0.001), "b": clock.engine("b", 0.003)}
    timing = measure_in_turn(engines, batch=2, warmup=2, rule=rounds_of(3), clock=clock)
    warmup = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    # Each timed inference follows one of the same engine that is not timed.
    # Every second round goes backwards.
    rounds = [[(name, index)] * 2 for index, names in enumerate(("ab", "ba", "ab")) for name in names]
    assert clock.calls == [*warmup, *itertools.chain(*rounds)]
    assert timing.latencies["a"].samples == pytest.approx((1.0, 1.0, 1.0))
    assert timing.latencies["b"].samples == pytest.approx((3.0, 3.0, 3.0))
    assert timing.seconds == pytest.approx(0.024)
    assert {latency.warmup for latency in timing.latencies.values()} == {2}


def test_the_first_inference_stands_apart() -> None:
    clock = FakeClock()
    seconds = iter([0.5, 0.01, 0.02, 0.03])

    def call(index: int) -> None:
        clock.now += next(seconds)

    entered: list[str] = []

    @contextlib.contextmanager
    def around(name: str) -> Iterator[None]:
        entered.append(name)
        assert clock.now == 0
        yield
        assert clock.now == pytest.approx(0.51)

    latency = measure_in_turn(
        {"a": call}, batch=1, warmup=2, rule=rounds_of(2), clock=clock, around_warmup=around
    ).latencies["a"]
    assert latency.first == pytest.approx(500)
    assert latency.samples == pytest.approx((20, 30))
    assert entered == ["a"]


def test_the_place_in_a_round_cancels() -> None:
    """Whoever comes second is a tenth faster, whoever it is; the two are alike."""
    clock = FakeClock()

    def call(index: int) -> None:
        clock.calls.append(("", index))
        clock.now += 0.010 if (len(clock.calls) - 1) % 4 < 2 else 0.009

    timing = measure_in_turn({"a": call, "b": call}, batch=1, warmup=2, rule=rounds_of(100), clock=clock)
    found = compare_samples(timing.samples["a"], timing.samples["b"])
    assert found.ratio == pytest.approx(1, abs=0.01)
    assert found.low == pytest.approx(0.9)
    assert found.high == pytest.approx(1 / 0.9)


def test_one_engine_alone_needs_no_untimed_run_between() -> None:
    clock = FakeClock()
    measure_in_turn({"a": clock.engine("a", 1.0)}, batch=1, warmup=1, rule=rounds_of(3), clock=clock)
    assert clock.calls == [("a", 0), ("a", 0), ("a", 1), ("a", 2)]


@pytest.mark.parametrize(("runs", "budget_s", "expected"), [(100, 30.0, 15), (100, 1.0, MINIMUM_ROUNDS), (5, 1.0, 5)])
def test_time_budget(runs: int, budget_s: float, expected: int) -> None:
    clock = FakeClock()
    rounds = []
    timing = measure_in_turn(
        {"a": clock.engine("a", 0.5), "b": clock.engine("b", 0.5)},
        batch=1, warmup=1, rule=rounds_of(runs, budget_s=budget_s), clock=clock, on_round=lambda: rounds.append(1),
    )  # fmt: skip
    assert [len(samples) for samples in timing.samples.values()] == [expected, expected]
    assert len(rounds) == expected


def test_median_interval_is_the_binomials() -> None:
    # For n = 10 the textbook interval of the median is from the 2nd to the 9th, with 97.9% coverage.
    assert median_interval(list(range(1, 11))) == (2, 9)
    assert median_interval([1.0] * 5) is None  # 2 / 2**5 > 5%
    assert median_interval([1.0] * 6) == (1.0, 1.0)
    assert median_interval([]) is None


@pytest.mark.parametrize("n", [6, 17, 100, 1001])
def test_median_interval_covers_as_promised(n: int) -> None:
    low, high = median_interval(list(range(n))) or (math.nan, math.nan)
    k = int(low) + 1
    assert high == n - k

    def coverage(k: int) -> float:
        # Whole numbers until the division: the oracle has no rounding.
        below: int = sum(math.comb(n, i) for i in range(k))
        return 1 - 2 * (below / (1 << n))

    assert coverage(k) >= 0.95 > coverage(k + 1)


def test_a_wider_interval_lies_further_from_the_middle() -> None:
    samples = list(range(1, 101))
    assert median_interval(samples) == (40, 61)
    assert median_interval(samples, widened=2.0) == (30, 71)
    assert median_interval(samples, widened=6.0) is None


def test_dependence_is_that_of_the_process() -> None:
    """For a series with correlation r from one to the next, intervals widen by sqrt((1 + r) / (1 - r)).

    Signs of a Gaussian series have the correlation 2 / pi * asin(r^k) at distance k (the arcsine law), whose sum over
    all k is the exact value for medians.
    """
    random, r, length = np.random.default_rng(0), 0.8, 20_000
    noise, series = random.standard_normal(length) * math.sqrt(1 - r * r), [0.0]
    for value in noise:
        series.append(r * series[-1] + value)
    exact = 1 + 2 * sum(2 / math.pi * math.asin(r**k) for k in range(1, 100))
    assert dependence(series[1:]) == pytest.approx(math.sqrt(exact), rel=0.35)
    assert dependence(noise.tolist()) < 1.5
    assert dependence([1.0, 2.0] * 20) == 1  # too few to tell
    assert dependence([3.0] * 100) == 1
    assert dependence([]) == 1


def speedup_of(ratio: float, *, noise: float = 0.0, rounds: int = 100, drift: float = 0.0) -> Speedup:
    random = np.random.default_rng(7)
    machine = 10 * np.exp(drift * np.linspace(0, 1, rounds))
    base = machine * np.exp(noise * random.standard_normal(rounds))
    other = machine / ratio * np.exp(noise * random.standard_normal(rounds))
    return compare_samples(base.tolist(), other.tolist())


@pytest.mark.parametrize(
    ("ratio", "noise", "rounds", "expected"),
    [
        (1.5, 0.05, 100, "faster"),
        (0.7, 0.05, 100, "slower"),
        (1.0, 0.01, 100, "same"),
        (1.01, 0.3, 50, "undecided"),
        (2.0, 0.0, 5, "undecided"),
    ],
)
def test_findings(ratio: float, noise: float, rounds: int, expected: str) -> None:
    assert speedup_of(ratio, noise=noise, rounds=rounds).finding == expected


def test_drift_of_the_machine_cancels() -> None:
    """A machine that slows down threefold during the run still shows a small difference."""
    found = speedup_of(1.1, noise=0.01, drift=math.log(3))
    assert found.finding == "faster"
    assert found.ratio == pytest.approx(1.1, rel=0.01)


def test_five_rounds_give_no_interval() -> None:
    found = speedup_of(2.0, rounds=5)
    assert found.ratio == pytest.approx(2.0)
    assert (found.low, found.high) == (None, None)
    assert found.to_json()["finding"] == "undecided"


def test_compare_wants_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="longer"):
        compare_samples([1.0], [1.0, 2.0])


def test_openings_show_how_sessions_differ() -> None:
    """Two sessions of one file: each is off by some percent for as long as it lives, beside the noise of a round."""
    random = np.random.default_rng(0)
    covered = {"one opening": 0, "openings": 0}
    for _ in range(200):
        off = np.exp(random.normal(0, 0.03, (2, 8, 1)))
        first, second = off * np.exp(random.normal(0, 0.01, (2, 8, 20)))
        for name, found in (
            ("one opening", compare_samples(first[0].tolist(), second[0].tolist())),
            ("openings", compare_openings(first.tolist(), second.tolist())),
        ):
            assert found.low is not None
            assert found.high is not None
            covered[name] += found.low <= 1 <= found.high
        assert compare_openings(first.tolist(), second.tolist()).rounds == 8
    assert covered["openings"] >= 0.93 * 200
    assert covered["one opening"] <= 0.25 * 200, "else there was nothing to mend"
