"""The cubic schedule against its formula in exact fractions, at its boundaries, and its errors."""

import random
from fractions import Fraction

import pytest

from pst.errors import ConfigError
from pst.schedule import CubicSchedule


def formula(t: int, T: int, initial: Fraction, final: Fraction, i: Fraction, f: Fraction) -> Fraction:
    if t <= i * T:
        return initial
    if t > (1 - f) * T:
        return final
    return final + (initial - final) * (1 - (t - i * T) / ((1 - i - f) * T)) ** 3


def test_equals_the_formula_at_random_points() -> None:
    source = random.Random(0)
    for _ in range(2000):
        T = source.randint(1, 5000)
        i, f = Fraction(source.randint(0, 63), 128), Fraction(source.randint(0, 63), 128)  # exact in binary
        initial, final = sorted(Fraction(source.randint(0, 1023), 1024) for _ in range(2))
        schedule = CubicSchedule(
            initial=float(initial), final=float(final), steps=T, warmup=float(i), cooldown=float(f)
        )
        t = source.randint(0, T)
        assert schedule(t) == pytest.approx(float(formula(t, T, initial, final, i, f)), abs=1e-12)


def test_the_published_defaults_by_hand() -> None:
    schedule = CubicSchedule(initial=0.0, final=0.8, steps=100)
    assert [schedule(t) for t in (0, 10)] == [0.0, 0.0]
    assert schedule(25) == pytest.approx(0.8 - 0.8 * 0.75**3)
    assert schedule(40) == pytest.approx(0.8 - 0.8 * 0.5**3)
    assert schedule(70) == pytest.approx(0.8)
    assert [schedule(t) for t in (71, 100, 1000)] == [0.8, 0.8, 0.8]


def test_the_boundaries_belong_to_the_side_that_the_formula_says() -> None:
    schedule = CubicSchedule(initial=0.1, final=0.9, steps=64, warmup=0.25, cooldown=0.25)
    assert schedule(16) == 0.1  # t = i T
    assert schedule(17) > 0.1
    assert schedule(47) < 0.9
    assert schedule(48) == 0.9  # t = (1 - f) T: the ramp has arrived
    assert schedule(49) == 0.9


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.0, 0.0), (0.1, 0.3), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_never_falls_and_never_leaves_its_range(warmup: float, cooldown: float) -> None:
    for steps in (1, 2, 3, 10, 97):
        schedule = CubicSchedule(initial=0.2, final=0.95, steps=steps, warmup=warmup, cooldown=cooldown)
        values = [schedule(t) for t in range(steps + 2)]
        assert values == sorted(values)
        assert values[0] == 0.2
        assert values[-1] == 0.95


def test_no_room_for_a_ramp_is_a_step_whatever_the_rounding() -> None:
    """0.29 + 0.71 and 0.57 + 0.43 make 1, but (1 - 0.71) 100 and (1 - 0.43) 100 come out above 29 and 57."""
    for hundredths in range(101):
        warmup, cooldown = hundredths / 100, (100 - hundredths) / 100
        for steps in (7, 10, 100, 333):
            schedule = CubicSchedule(initial=0.0, final=0.9, steps=steps, warmup=warmup, cooldown=cooldown)
            values = [schedule(t) for t in range(steps + 1)]
            assert values == sorted(values)
            assert min(values) >= 0.0
            assert max(values) <= 0.9


def test_a_flat_schedule_stays_where_it_is() -> None:
    schedule = CubicSchedule(initial=0.5, final=0.5, steps=10)
    assert {schedule(t) for t in range(11)} == {0.5}


@pytest.mark.parametrize(
    ("warmup", "cooldown"),
    [(0.6, 0.5), (-0.1, 0.3), (0.1, -0.3), (1.1, 0.0), (float("nan"), 0.3), (0.1, float("nan"))],
)
def test_fractions_that_leave_no_room_are_refused(warmup: float, cooldown: float) -> None:
    with pytest.raises(ConfigError, match="both are fractions of training and together at most 1"):
        CubicSchedule(initial=0.0, final=0.5, steps=10, warmup=warmup, cooldown=cooldown)


@pytest.mark.parametrize(("initial", "final"), [(0.6, 0.5), (-0.1, 0.5), (float("nan"), 0.5), (0.0, float("nan"))])
def test_a_schedule_that_runs_backwards_is_refused(initial: float, final: float) -> None:
    with pytest.raises(ConfigError, match="must lie between 0 and the final sparsity"):
        CubicSchedule(initial=initial, final=final, steps=10)
