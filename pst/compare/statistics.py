"""Mean, spread and paired differences of a few runs.

    mean        sum x_i / n
    std         sqrt(sum (x_i - mean)^2 / (n - 1)), of the sample; none for n = 1
    difference  d_i = x_i - y_i for each seed i that both have; its mean, and its standard error std(d) / sqrt(n)

Runs of one seed share the head's start and the order of the rows, so the difference within a seed varies less than the
two values do. A difference counts as clear when it is more than two of its standard errors away from 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Several values of one quantity."""

    n: int
    mean: float
    std: float | None
    """Sample standard deviation; None for one value."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity minus another, seed by seed."""

    n: int
    """Seeds that both have."""
    mean: float
    error: float | None
    """Standard error of the mean; None for one seed."""

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors away from 0; never for one seed."""
        return self.error is not None and abs(self.mean) > 2 * self.error


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean and spread of *values*; None for none."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Summary(n=1, mean=mean, std=None)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Summary(n=len(values), mean=mean, std=math.sqrt(squares / (len(values) - 1)))


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """*values* minus *others*, both by seed; None where they share no seed."""
    summary = summarize([values[seed] - others[seed] for seed in values if seed in others])
    if summary is None:
        return None
    error = None if summary.std is None else summary.std / math.sqrt(summary.n)
    return Difference(n=summary.n, mean=summary.mean, error=error)
