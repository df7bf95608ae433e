"""Weights with zeros, for the tests of kernels that skip them."""

from typing import Any

import numpy as np


def with_zeros(outputs: int, inputs: int, *, density: float, seed: int = 0) -> "np.ndarray[Any, Any]":
    random = np.random.default_rng(seed)
    kept = random.random((outputs, inputs)) < density
    return random.standard_normal((outputs, inputs), np.float32) * kept


def two_of_four(outputs: int, inputs: int, *, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Two of each four, and now and then one or none."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((outputs, inputs // 4, 4), np.float32)
    np.put_along_axis(weight, np.argsort(random.random(weight.shape), axis=2)[:, :, :2], 0, axis=2)
    return (weight * (random.random(weight.shape) < 0.9)).reshape(outputs, inputs)
