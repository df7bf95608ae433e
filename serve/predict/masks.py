"""Random masks of a pattern: where the zeros lie is chance, how many there are and in what form is the pattern's."""

import numpy as np

from pst.patterns import Pattern
from pst.patterns.block import Block
from pst.patterns.n_m import NM

Mask = np.ndarray


def random_mask(
    pattern: Pattern, shape: tuple[int, int], sparsity: float, random: np.random.Generator, *, name: str
) -> Mask:
    """Which weights of a matrix (outputs, inputs) are not zero, as a bool array of that shape.

    *name* is the matrix's in messages. Raises PatternError where the pattern does not fit it.
    """
    pattern.check(shape, axis=1, name=name)
    outputs, inputs = shape
    if isinstance(pattern, NM):
        order = random.random((outputs * inputs // pattern.m, pattern.m), dtype=np.float32).argpartition(
            pattern.n - 1, axis=1
        )
        mask = np.zeros(order.shape, dtype=bool)
        np.put_along_axis(mask, order[:, : pattern.n], True, axis=1)
        return mask.reshape(shape)
    if isinstance(pattern, Block):
        tiles = _kept((outputs // pattern.rows) * (inputs // pattern.columns), sparsity, random)
        grid = tiles.reshape(outputs // pattern.rows, inputs // pattern.columns)
        return grid.repeat(pattern.rows, axis=0).repeat(pattern.columns, axis=1)
    return _kept(outputs * inputs, sparsity, random).reshape(shape)


def _kept(count: int, sparsity: float, random: np.random.Generator) -> Mask:
    """*count* flags of which int(count * sparsity), drawn at random, are False."""
    mask = np.ones(count, dtype=bool)
    mask[: int(count * sparsity)] = False
    random.shuffle(mask)
    return mask
