"""One ratio for several workloads, against numpy and against adding times up."""

import numpy as np
import pytest

from serve.bench.timing import Speedup
from serve.tune.overall import combine, geometric, of_time

RATIOS = (0.5, 1.5, 4.0)


def speedup(ratio: float, *, half: float | None = 0.1) -> Speedup:
    low, high = (None, None) if half is None else (ratio - half, ratio + half)
    return Speedup(ratio=ratio, low=low, high=high, rounds=int(100 * ratio))


def test_the_geometric_mean() -> None:
    assert geometric(RATIOS) == pytest.approx(float(np.prod(RATIOS)) ** (1 / 3))


def test_of_traffic_all_the_time_counts() -> None:
    counts, dense, sparse = np.array([900, 90, 10]), np.array([2.0, 10.0, 50.0]), np.array([1.9, 5.0, 60.0])
    expected = float((counts * dense).sum() / (counts * sparse).sum())
    assert of_time((dense / sparse).tolist(), (counts * dense).tolist()) == pytest.approx(expected)


@pytest.mark.parametrize("times", [None, (3.0, 2.0, 1.0)])
def test_the_interval_is_the_mean_of_the_ends(times: tuple[float, ...] | None) -> None:
    def mean(ratios: list[float]) -> float:
        return geometric(ratios) if times is None else of_time(ratios, times)

    found = combine([speedup(ratio) for ratio in RATIOS], times)
    assert found.ratio == pytest.approx(mean(list(RATIOS)))
    assert (found.low, found.high) == (mean([each - 0.1 for each in RATIOS]), mean([each + 0.1 for each in RATIOS]))
    assert found.rounds == 50


def test_one_unknown_interval_leaves_the_mean_unknown() -> None:
    found = combine([speedup(2.0), speedup(3.0, half=None)], None)
    assert (found.low, found.high, found.finding) == (None, None, "undecided")


def test_the_interval_covers_the_mean_more_often_than_promised() -> None:
    """Intervals that each hold in 95% of trials: the mean's holds in more, as the workloads are independent."""
    random, inside = np.random.default_rng(0), 0
    for _ in range(500):
        found = combine([speedup(1 + 0.05 * random.standard_normal(), half=0.05 * 1.96) for _ in range(4)], None)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 1.0 <= found.high
    assert inside > 475
