"""Random masks hold their pattern, with the right number of zeros."""

import numpy as np
import pytest

from pst.errors import PatternError
from pst.patterns import parse_pattern
from serve.predict.masks import random_mask


@pytest.mark.parametrize(
    ("spec", "sparsity", "density"),
    [("2:4", 0.5, 0.5), ("1:8", 0.875, 0.125), ("unstructured", 0.9, 0.1), ("block:4x8", 0.75, 0.25)],
)
def test_the_pattern_holds(spec: str, sparsity: float, density: float) -> None:
    pattern, random = parse_pattern(spec), np.random.default_rng(0)
    mask = random_mask(pattern, (32, 64), sparsity, random, name="w")
    assert mask.shape == (32, 64)
    assert mask.dtype == np.bool_
    assert mask.mean() == pytest.approx(density, abs=1e-3)
    assert pattern.holds(mask.astype(np.float32), axis=1)
    assert not np.array_equal(mask, random_mask(pattern, (32, 64), sparsity, random, name="w"))


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PatternError, match=r"layer\.1 has 6 weights"):
        random_mask(parse_pattern("2:4"), (8, 6), 0.5, np.random.default_rng(0), name="layer.1")
