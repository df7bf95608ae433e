"""How a sparse weight lies in memory for the kernels of sparse_cpu, and which weights they are faster with."""

import operator

import numpy as np

from serve.engines import Array

ANYWHERE, TWO_OF_FOUR = "SparseLinear", "TwoOfFourLinear"
"""The operators: for zeros anywhere, and in 2:4."""
DENSEST = 0.55
"""Share of a weight that is not zero, up to which skipping the zeros is faster on the processors that were tried."""
DENSEST_OF_FEW = 0.35
"""The same for a model that reads one token or a few at a time. In 2:4 it is faster with half of them."""
HALF = 2 / 4
"""The share of a weight in 2:4."""
ENOUGH = f"from {1 - DENSEST:.0%} zeros on"
BLOCK, WIDE_BLOCK, WIDE_UP_TO = 128, 256, 0.25
"""Inputs of a block: 64 tokens of it fit the first cache; of a weight with fewer values the rows would be too short."""
READ_AHEAD = 8
"""Values behind the last that the kernel reads, and does not use."""
PAIRS_BLOCK, GROUP, WORD = 96, 16, 32
"""Of 2:4: inputs of a block, rows that lie together, and inputs whose bits a word holds."""
CHOSEN_OF_FOUR = np.array(
    [np.argsort([not mask >> place & 1 for place in range(4)], kind="stable")[:2] for mask in range(16)]
)
"""By which of four numbers are not zero, as bits: two places, those of what is not zero first, in their order."""


def densest(*, few: bool) -> float:
    """DENSEST, or DENSEST_OF_FEW of a model that reads a few tokens at a time."""
    return DENSEST_OF_FEW if few else DENSEST


def form_of(weight: Array, share: float, *, few: bool) -> str:
    """The operator that is faster than dense for *weight* (outputs, inputs), of which *share* is not zero, or empty."""
    if DENSEST_OF_FEW < share <= HALF and is_two_of_four(weight):
        return TWO_OF_FOUR
    return ANYWHERE if share <= densest(few=few) else ""


def block_of(share: float) -> int:
    """Inputs of each block in which the rows of a weight are multiplied, of which *share* is not zero."""
    return WIDE_BLOCK if share < WIDE_UP_TO else BLOCK


def in_blocks(weight: Array, block: int) -> dict[str, Array]:
    """What SparseLinear reads of a *weight* (outputs, inputs), block by block; see sparse_cpu/anywhere.h."""
    parts = [weight[:, start : start + block] for start in range(0, weight.shape[1], block)]
    kept = [part != 0 for part in parts]
    columns = [np.broadcast_to(np.arange(mask.shape[1], dtype=np.uint8), mask.shape)[mask] for mask in kept]
    counts = np.concatenate([[0], *(np.count_nonzero(mask, axis=1) for mask in kept)])
    return {
        "values": np.concatenate([*map(operator.getitem, parts, kept), np.zeros(READ_AHEAD, np.float32)]),
        "columns": np.concatenate(columns),
        "masks": np.concatenate([np.packbits(mask, axis=1, bitorder="little").ravel() for mask in kept]),
        "starts": np.cumsum(counts).astype(np.int32),
    }


def is_two_of_four(weight: Array) -> bool:
    """Whether of each four inputs of a row of *weight* (outputs, inputs) at most two are not zero."""
    outputs, inputs = weight.shape
    return inputs % 4 == 0 and bool(((weight.reshape(outputs, -1, 4) != 0).sum(axis=2) <= 2).all())


def as_two_of_four(weight: Array) -> dict[str, Array]:
    """What TwoOfFourLinear reads of a *weight* (outputs, inputs); see sparse_cpu/two_of_four.h."""
    outputs, inputs = weight.shape
    groups = -(-outputs // GROUP)
    padded = np.zeros((groups * GROUP, inputs), np.float32)
    padded[:outputs] = weight
    values, words = [], []
    for start in range(0, inputs, PAIRS_BLOCK):
        fours = padded[:, start : start + PAIRS_BLOCK].reshape(-1, 4)
        chosen = CHOSEN_OF_FOUR[np.packbits(fours != 0, axis=1, bitorder="little").ravel()]
        found = np.take_along_axis(fours, chosen, axis=1).reshape(groups, GROUP, -1)
        bits = np.zeros((groups * GROUP, -(-found.shape[2] * 2 // WORD) * WORD // 2), np.uint32)
        bits[:, : found.shape[2]] = chosen.reshape(groups * GROUP, -1)
        each = bits.reshape(groups, GROUP, -1, WORD // 2) << np.arange(0, WORD, 2, dtype=np.uint32)
        values.append(found.transpose(0, 2, 1).ravel())
        words.append(np.bitwise_or.reduce(each, axis=3).transpose(0, 2, 1).ravel())
    return {"values": np.concatenate(values), "words": np.concatenate(words)}
