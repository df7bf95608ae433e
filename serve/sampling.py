"""Which token follows: the one of the highest score, or one that is drawn."""

import math
from dataclasses import dataclass

import numpy as np

from pst.errors import ConfigError
from serve.classify import softmax
from serve.engines import Array


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError for values that make no sense."""

    temperature: float = 0.0
    """0: always the highest score. Above: scores are divided by it, so that 1 draws from what the model says."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities add up to this (nucleus sampling, arXiv 1904.09751)."""
    seed: int | None = None
    """Of the random numbers; None takes another one each time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; give 0 for the likeliest token, or a number above.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie above 0, and 1 at most.")
        if self.seed is not None and self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more.")


class Picker:
    """Chooses one token after the other of one text."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._random = sampling, np.random.default_rng(sampling.seed)

    def pick(self, logits: Array) -> int:
        """The next token, from its scores (vocabulary,)."""
        if not self._sampling.temperature:
            return int(logits.argmax())
        return int(self._random.choice(len(logits), p=nucleus(logits, self._sampling)))


def nucleus(logits: Array, sampling: Sampling) -> Array:
    """The probabilities that a token is drawn with, (vocabulary,) float64; the likeliest is never left out."""
    probabilities = softmax(logits.astype(np.float64) / sampling.temperature)
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0.0
    return np.asarray(probabilities / probabilities.sum())
