"""When enough was measured: a shape goes on until the interval of every ratio is narrow enough, or time is up.

What is guaranteed. To stop where an interval looks narrow is no choice among results, as stopping where a ratio looks
good would be: a width does not say on which side of the truth a ratio lies. But it is not free either. The width is an
estimate, and the rule stops early where it came out too small by chance; the interval then covers less than it promises
(Chow and Robbins, 1965: exact only in the limit of narrow intervals). Three things keep the coverage near 95%: no look
before LEAST_ROUNDS, looks at each tenth more of rounds and not after every one, and LOOKS in a row that have to be
narrow. And the interval itself allows for rounds that depend on each other (serve.bench.timing.dependence); without
that, a machine whose speed comes in waves makes intervals several times too narrow.

Simulated with known ratios (tests/serve/bench/test_stopping.py): 97% covered with independent rounds, 94% to 97% where
rounds are alike over a few, 86% to 90% over tens, where a coarse precision ends after a few of these waves. No rule
sees a wave longer than the measurement: a change for all of it looks like a result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serve.bench.timing import Speedup, compare_samples

PRECISION = 0.01
"""Default half width of a ratio's interval, relative to it: half of EQUAL_WITHIN, so that equal speeds can be told."""
LEAST_ROUNDS = 100
"""Before which no interval counts as narrow."""
MOST_ROUNDS = 10_000
"""After which a shape ends whatever its interval: more would make a report of megabytes."""
MINIMUM_ROUNDS = 10
"""That even a spent budget does not cut."""
GROWTH = 1.1
"""Rounds at one look over those at the look before."""
LOOKS = 2
"""How many in a row have to be narrow."""

Width = Callable[[Mapping[str, Sequence[float]]], float | None]
Reason = Literal["precision", "budget", "runs"]


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """Why a workload ended, and how well its ratios are known."""

    reason: Reason
    """Narrow enough; the budget was spent; or as many rounds as there were to be."""
    rounds: int
    seconds: float
    """Of timed rounds, with the inferences between them that are not timed."""
    asked: float | None
    """The half width that was asked for, relative to the ratio; None where none was."""
    half_width: float | None
    """The widest of all ratios', likewise; None without a ratio, or with too few rounds for an interval."""
    openings: int = 1
    """How often all artifacts were opened; the rounds are those of all openings."""

    def sentence(self, workload: str) -> str:
        """For people: why it ended, and what would help where that is not because the interval is narrow."""
        after = f"{workload}: stopped after {self.rounds} rounds in {self.seconds:.1f} s"
        after += "" if self.openings == 1 else f", in {self.openings} openings"
        reached = "" if self.half_width is None else f"every ratio is within {self.half_width:.2%} of what was measured"
        if self.asked is None or self.reason == "precision":
            return f"{after}, {reached or 'all that were asked for'}."
        limit = "--budget was spent" if self.reason == "budget" else f"{MOST_ROUNDS} is the most"
        if self.half_width is None:
            return f"{after}, because {limit}: too few rounds for an interval; give a larger --budget."
        if self.half_width <= self.asked:
            return f"{after}, because {limit}, when {reached}; two looks in a row have to find that."
        # An interval narrows with the square root of the rounds.
        needed = self.seconds * max(1.0, self.half_width / self.asked) ** 2
        return (
            f"{after}, because {limit}: the machine is too noisy to know every ratio within {self.asked:.2%} by then. "
            f"It got to {self.half_width:.2%}, and would take about {max(1.0, needed):.0f} s; measure on a quieter "
            "machine, or give a larger --budget or --precision."
        )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class StopRule:
    """Asked after each round whether it was the last; one object for each workload.

    *runs*: the least number of rounds, unless *budget_s* cuts it. *precision*: 0 stops there. *width*: of what the
    samples are for, its interval's half width relative to it.
    """

    def __init__(self, *, runs: int, precision: float, budget_s: float, width: Width | None = None) -> None:
        self._runs, self._precision, self._budget_s, self._width = runs, precision, budget_s, width or half_width
        self._next_look, self._narrow = max(runs, LEAST_ROUNDS), 0
        self.reason: Reason | None = None

    def reached(self, samples: Mapping[str, Sequence[float]], *, seconds: float) -> bool:
        """*samples*: milliseconds by engine, the baseline first; *seconds* since the first round began."""
        rounds = len(next(iter(samples.values())))
        wanted = bool(self._precision) and len(samples) > 1
        if rounds >= (max(self._runs, MOST_ROUNDS) if wanted else self._runs):
            self.reason = "runs"
        elif wanted and rounds >= self._next_look:
            self._next_look = int(rounds * GROWTH) + 1
            width = self._width(samples)
            self._narrow = self._narrow + 1 if width is not None and width <= self._precision else 0
            if self._narrow >= LOOKS:
                self.reason = "precision"
        if self.reason is None and rounds >= MINIMUM_ROUNDS and seconds >= self._budget_s:
            self.reason = "budget"
        return self.reason is not None

    def stopped(self, samples: Mapping[str, Sequence[float]], *, seconds: float) -> Stopped:
        """What there is to say, once reached."""
        assert self.reason is not None
        return Stopped(
            reason=self.reason,
            rounds=len(next(iter(samples.values()))),
            seconds=seconds,
            asked=self._precision if self._precision and len(samples) > 1 else None,
            half_width=self._width(samples),
        )


def half_width(samples: Mapping[str, Sequence[float]]) -> float | None:
    """The widest interval of all ratios to the first, half of it and relative to the ratio; None where one has none."""
    baseline, *others = samples.values()
    widths = [relative_half_width(compare_samples(baseline, each)) for each in others]
    known = [width for width in widths if width is not None]
    return max(known) if known and len(known) == len(widths) else None


def relative_half_width(speedup: Speedup) -> float | None:
    """Of one ratio."""
    if speedup.low is None or speedup.high is None:
        return None
    return (speedup.high - speedup.low) / 2 / speedup.ratio
