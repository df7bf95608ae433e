"""The cubic sparsity schedule of Zhu and Gupta (arXiv 1710.01878), as PST uses it."""

from dataclasses import dataclass

from pst.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CubicSchedule:
    """Sparsity at step t of T: *initial* for t <= warmup T, *final* for t > (1 - cooldown) T, a cubic between."""

    initial: float
    final: float
    steps: int
    warmup: float = 0.1
    cooldown: float = 0.3

    def __post_init__(self) -> None:
        """Raise ConfigError for fractions that leave no room for the ramp, or a schedule that runs backwards."""
        if not (self.warmup >= 0 and self.cooldown >= 0 and self.warmup + self.cooldown <= 1):  # NaN included
            raise ConfigError(
                f"The sparsity schedule has warm-up {self.warmup:g} and cool-down {self.cooldown:g}; "
                "both are fractions of training and together at most 1."
            )
        if not 0 <= self.initial <= self.final:
            raise ConfigError(
                f"The initial sparsity {self.initial:g} must lie between 0 and the final sparsity {self.final:g}."
            )

    def __call__(self, step: int) -> float:
        """Sparsity for the step-th update, counted from 0."""
        start, end = self.warmup * self.steps, (1 - self.cooldown) * self.steps
        if step > end:
            return self.final
        if step <= start:
            return self.initial
        left = (end - step) / (end - start)  # 1 - (t - iT) / ((1 - i - f) T), in [0, 1) whatever the rounding
        return self.final + (self.initial - self.final) * left**3
