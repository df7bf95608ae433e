"""One ratio for all workloads: their geometric mean, or that of the time which all inferences together take."""

import math
from collections.abc import Sequence
from typing import Literal

from serve.bench.timing import Speedup

Mean = Literal["geometric mean", "traffic"]


def geometric(ratios: Sequence[float]) -> float:
    """exp of the mean of the logarithms: each workload counts alike."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def of_time(ratios: Sequence[float], times: Sequence[float]) -> float:
    """All the baseline's time over all the candidate's. *times*: the baseline's at each workload, count x median."""
    return math.fsum(times) / math.fsum(time / ratio for time, ratio in zip(times, ratios, strict=True))


def combine(speedups: Sequence[Speedup], times: Sequence[float] | None) -> Speedup:
    """The mean of *speedups*; of_time where there are *times*, else geometric.

    Both means rise with each ratio, so that the mean of all lower ends and that of all upper ends enclose the mean of
    the true ratios where every interval holds. As workloads were measured apart, it is wider than need be.
    """

    def mean(ratios: Sequence[float]) -> float:
        return geometric(ratios) if times is None else of_time(ratios, times)

    lows = [each.low for each in speedups if each.low is not None]
    highs = [each.high for each in speedups if each.high is not None]
    known = len(lows) == len(highs) == len(speedups)
    return Speedup(
        ratio=mean([each.ratio for each in speedups]),
        low=mean(lows) if known else None,
        high=mean(highs) if known else None,
        rounds=min(each.rounds for each in speedups),
    )
