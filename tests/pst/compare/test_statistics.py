"""Means, spreads and paired differences against numpy, and what the report says of them."""

import math

import numpy as np
import pytest

from pst.compare.results import Row, verdict
from pst.compare.statistics import paired, summarize


def row(method: str, values: dict[int, float]) -> Row:
    return Row(
        method=method, pattern="2:4", sparsity=0.5, value=summarize(list(values.values())), by_seed=values, failed=0,
        to_dense=None, measured_sparsity=0.5, step_seconds=None, peak_memory_bytes=None, trainable_parameters=None,
    )  # fmt: skip


@pytest.mark.parametrize("n", [2, 3, 10])
def test_summary_is_numpys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.8, 0.05, n)
    found = summarize(values.tolist())
    assert found is not None
    assert found.n == n
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_one_value_has_no_spread_and_none_no_summary() -> None:
    one = summarize([0.5])
    assert one is not None
    assert (one.n, one.mean, one.std) == (1, 0.5, None)
    assert summarize([]) is None


def test_difference_is_taken_over_the_shared_seeds() -> None:
    random = np.random.default_rng(7)
    x = dict(zip([0, 1, 2, 4], random.normal(size=4).tolist(), strict=True))
    y = dict(zip([4, 3, 2, 1], random.normal(size=4).tolist(), strict=True))
    difference = np.array([x[seed] - y[seed] for seed in (1, 2, 4)])
    found = paired(x, y)
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(difference.mean(), rel=1e-12)
    assert found.error == pytest.approx(difference.std(ddof=1) / math.sqrt(3), rel=1e-12)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_pairing_sees_what_the_spread_of_the_seeds_hides() -> None:
    a, b = {0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.489, 1: 0.69, 2: 0.891}
    found = paired(a, b)
    assert found is not None
    assert found.clear
    text = verdict([row("magnitude", b), row("pst", a)], higher_is_better=True)
    assert "pst is best with 0.7000, 0.0100 ± 0.0006 ahead of magnitude (3 seeds): more than two" in text


def test_a_lead_within_noise_is_not_a_lead() -> None:
    text = verdict([row("pst", {0: 0.8, 1: 0.6}), row("magnitude", {0: 0.6, 1: 0.7})], higher_is_better=True)
    assert "pst is best with 0.7000, 0.0500 ± 0.1500 ahead of magnitude (2 seeds)" in text
    assert text.endswith("within two standard errors, so not told apart from noise.")


def test_equal_methods_are_not_told_apart() -> None:
    values = {0: 0.5, 1: 0.6}
    text = verdict([row("pst", values), row("magnitude", values)], higher_is_better=True)
    assert text == "2:4, 50%: pst and magnitude are equal with 0.5500."


def test_one_seed_says_nothing_of_noise() -> None:
    text = verdict([row("pst", {0: 0.8}), row("magnitude", {0: 0.6})], higher_is_better=True)
    assert "pst is best with 0.8000, 0.2000 ahead of magnitude; one seed shows no spread" in text


def test_lower_may_be_better() -> None:
    rows = [row("pst", {0: 20.0, 1: 22.0}), row("magnitude", {0: 15.0, 1: 17.5})]
    text = verdict(rows, higher_is_better=False)
    assert "magnitude is best with 16.25, 4.75 ± 0.2500 ahead of pst (2 seeds): more than two" in text


def test_failed_methods_are_no_contenders() -> None:
    assert verdict([row("pst", {}), row("magnitude", {})], higher_is_better=True) == "2:4, 50%: every run failed."
    text = verdict([row("pst", {}), row("magnitude", {0: 0.6})], higher_is_better=True)
    assert text == "2:4, 50%: magnitude alone has a result, 0.6000."
    apart = verdict([row("pst", {0: 0.5}), row("magnitude", {1: 0.6})], higher_is_better=True)
    assert "no seed in common with pst" in apart
