"""When to stop: what ends a workload, and that intervals still cover what they promise, by simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from serve.bench.stopping import LEAST_ROUNDS, MOST_ROUNDS, Stopped, StopRule, relative_half_width
from serve.bench.timing import Speedup, compare_samples

RATIO = 1.2
Noise = Callable[[np.random.Generator, int], np.ndarray]


def independent(scale: float) -> Noise:
    return lambda random, count: scale * random.standard_normal(count)


def dependent(scale: float, correlation: float) -> Noise:
    """A Gaussian series in which each value is *correlation* times the one before and new noise."""

    def make(random: np.random.Generator, count: int) -> np.ndarray:
        # As a sum over the past with weights that fade: exact but for weights below a thousandth.
        depth = math.ceil(math.log(1e-3) / math.log(correlation))
        weights = correlation ** np.arange(depth) * math.sqrt(1 - correlation**2)
        return scale * np.convolve(random.standard_normal(count + depth - 1), weights, mode="valid")

    return make


def run(base: np.ndarray, other: np.ndarray, *, precision: float, runs: int = LEAST_ROUNDS) -> tuple[Stopped, Speedup]:
    """What the rule makes of samples that are known beforehand, fed to it round by round."""
    rule = StopRule(runs=runs, precision=precision, budget_s=math.inf)
    samples: dict[str, list[float]] = {"base": [], "other": []}
    for one, two in zip(base.tolist(), other.tolist(), strict=True):
        samples["base"].append(one)
        samples["other"].append(two)
        if rule.reached(samples, seconds=0.0):
            return rule.stopped(samples, seconds=0.0), compare_samples(samples["base"], samples["other"])
    raise AssertionError("not enough samples for this precision")


@pytest.mark.parametrize(
    ("noise", "precision", "covered"),
    [
        pytest.param(independent(0.05), 0.02, 0.924, id="independent rounds"),
        pytest.param(independent(0.01), 0.02, 0.924, id="a precision that the first look finds"),
        pytest.param(dependent(0.05, 0.6), 0.03, 0.924, id="rounds alike over a few"),
        pytest.param(dependent(0.05, 0.9), 0.02, 0.85, id="rounds alike over tens"),
    ],
)
def test_the_interval_covers_the_ratio_after_stopping(noise: Noise, precision: float, covered: float) -> None:
    """In 500 measurements of a known ratio, 95% are to cover it: 92.4% or less would be found once in 200 times.

    With waves of tens of rounds fewer do, as the module's docstring says.
    """
    random, inside, trials = np.random.default_rng(1), 0, 500
    for _ in range(trials):
        # The machine's speed wanders by a factor of two, for both alike: it must not matter.
        machine = 10 * np.exp(0.3 * np.sin(np.linspace(0, 9, 5000)))
        difference = noise(random, 5000)
        stopped, found = run(machine * np.exp(difference), machine / RATIO, precision=precision)
        assert stopped.reason == "precision"
        assert stopped.half_width is not None
        assert stopped.half_width <= precision
        assert stopped.half_width == relative_half_width(found)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= RATIO <= found.high
    assert inside / trials > covered


def test_dependent_rounds_take_longer() -> None:
    """The same noise, but in waves: each round tells less, so that the rule waits for more of them."""
    random = np.random.default_rng(0)
    machine = np.full(9000, 10.0)
    rounds = []
    for noise in (independent(0.05), dependent(0.05, 0.9)):
        counts = [run(machine * np.exp(noise(random, 9000)), machine, precision=0.02)[0].rounds for _ in range(5)]
        rounds.append(np.mean(counts))
    assert rounds[1] > 4 * rounds[0]


def test_each_reason() -> None:
    quiet = {"a": [2.0] * LEAST_ROUNDS, "b": [1.0] * LEAST_ROUNDS}
    rule = StopRule(runs=5, precision=0.01, budget_s=10)
    assert not rule.reached({"a": [2.0] * 5, "b": [1.0] * 5}, seconds=0.1)
    assert not rule.reached(quiet, seconds=0.1), "one look is not enough"
    more = {name: values + values[:11] for name, values in quiet.items()}
    assert rule.reached(more, seconds=0.2)
    assert rule.stopped(more, seconds=0.2).to_json() == {
        "reason": "precision", "rounds": 111, "seconds": 0.2, "asked": 0.01, "half_width": 0.0, "openings": 1,
    }  # fmt: skip
    rule = StopRule(runs=5, precision=0.01, budget_s=10)
    assert rule.reached(quiet, seconds=11)
    assert rule.reason == "budget"
    rule = StopRule(runs=5, precision=0.01, budget_s=math.inf)
    assert rule.reached({"a": [1.0, 9.0] * (MOST_ROUNDS // 2), "b": [1.0] * MOST_ROUNDS}, seconds=1)
    assert rule.reason == "runs"


def test_one_engine_has_no_ratio_to_wait_for() -> None:
    rule = StopRule(runs=3, precision=0.01, budget_s=10)
    assert [rule.reached({"a": [1.0] * count}, seconds=1) for count in (1, 2, 3)] == [False, False, True]
    stopped = rule.stopped({"a": [1.0] * 3}, seconds=1)
    assert (stopped.reason, stopped.asked, stopped.half_width) == ("runs", None, None)
    assert stopped.sentence("1x8") == "1x8: stopped after 3 rounds in 1.0 s, all that were asked for."


def test_the_sentence_says_what_would_help() -> None:
    noisy = Stopped(reason="budget", rounds=200, seconds=40.0, asked=0.01, half_width=0.03)
    assert "--budget was spent: the machine is too noisy" in noisy.sentence("8x128")
    assert "It got to 3.00%, and would take about 360 s" in noisy.sentence("8x128")
    late = Stopped(reason="budget", rounds=90, seconds=15.0, asked=0.02, half_width=0.0175)
    assert late.sentence("8x128") == (
        "8x128: stopped after 90 rounds in 15.0 s, because --budget was spent, when every ratio is within 1.75% of "
        "what was measured; two looks in a row have to find that."
    )
    few = Stopped(reason="budget", rounds=5, seconds=40.0, asked=0.01, half_width=None)
    assert few.sentence("8x128").endswith("too few rounds for an interval; give a larger --budget.")
    reached = Stopped(reason="precision", rounds=200, seconds=4.0, asked=0.01, half_width=0.008)
    assert reached.sentence("x") == (
        "x: stopped after 200 rounds in 4.0 s, every ratio is within 0.80% of what was measured."
    )
