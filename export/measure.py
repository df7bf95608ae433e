"""Density, patterns and sizes of one weight, from where its non-zeros are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from pst.patterns import parse_pattern

Array = np.ndarray[Any, Any]
N_M = ("1:4", "2:4", "4:8")
"""N:M patterns looked for, from the most to the least specific: each implies the next."""
BLOCKS = ("block:32x1", "block:4x4", "block:1x4")
"""Blocks looked for, outputs x inputs."""


@dataclass(frozen=True, kw_only=True)
class WeightReport:
    """One weight of a matrix product."""

    name: str
    shape: tuple[int, ...]
    """As stored."""
    dtype: str
    """As the file's format calls it, in lower case."""
    axis: int
    """Reduction axis, as stored."""
    size: int
    """Entries."""
    zeros: int
    density: float
    """Fraction of non-zeros."""
    patterns: tuple[str, ...]
    """Those that hold, most specific first: N:M, blocks, rows, columns, else unstructured; none for a dense weight."""
    zero_rows: int
    """Outputs whose weights are all zero: rows of nn.Linear, however the file stores it."""
    zero_columns: int
    """Inputs whose weights are all zero: columns of nn.Linear, however the file stores it."""
    prunable: bool
    """Whether training prunes this weight, as far as its name tells."""
    dense_bytes: int
    bitmask_bytes: int
    """One bit per entry and the non-zeros; the dense size where that is smaller."""
    two_four_bytes: int
    """Half the entries and two bits for the place of each, where 2:4 holds; elsewhere the dense size."""
    sparse_bytes: int
    """The non-zeros and an int64 index for each, as in ONNX's sparse_initializer; or the dense size."""
    zstd_bytes: int
    """The stored bytes through Zstandard at level 3."""
    form: str = "Linear"
    """What multiplies with it: the ONNX operator, MatMul, Gemm or Conv; of a safetensors file Linear or Conv1D."""
    stated: str | None = None
    """The pattern that the folder's sparsity.json or export.json gives it; None where it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over a whole file."""

    parameters: int
    """Floating-point entries, embeddings, norms and biases included."""
    zeros: int
    density: float
    """Fraction of non-zeros over all parameters."""
    prunable_parameters: int
    prunable_zeros: int
    prunable_density: float
    """Over the prunable weights of the table; 1 where there are none."""
    dense_bytes: int
    """Of all parameters, in their stored type."""
    bitmask_bytes: int
    """Of all parameters with each weight of the table as bitmask and values, or dense where that is smaller."""
    two_four_bytes: int | None
    """Likewise with weights that hold 2:4 in that form; None where none does."""
    sparse_bytes: int
    """Likewise with values and int64 indices: what ``pst export --storage sparse`` writes."""
    zstd_bytes: int
    """Likewise with each weight of the table through Zstandard at level 3."""


def measure(
    name: str,
    nonzero: Array,
    data: Callable[[], bytes],
    *,
    axis: int,
    dtype: str,
    itemsize: float,
    prunable: bool,
    form: str = "Linear",
    stated: str | None = None,
    shape: tuple[int, ...] | None = None,
    stored_axis: int | None = None,
) -> WeightReport:
    """Report on a 2-D bool array *nonzero* with reduction *axis*; *data* gives the stored bytes, *itemsize* per entry.

    *shape* and *stored_axis* say how the file stores it where that is not 2-D.
    """
    size, kept = nonzero.size, int(np.count_nonzero(nonzero))
    patterns = find_patterns(nonzero, axis=axis)
    dense = math.ceil(size * itemsize)
    by_row = nonzero if axis == 1 else nonzero.T  # outputs x inputs
    return WeightReport(
        name=name, shape=shape or nonzero.shape, dtype=dtype, axis=axis if stored_axis is None else stored_axis,
        size=size, zeros=size - kept, density=kept / size, patterns=patterns,
        zero_rows=int((~by_row.any(axis=1)).sum()),
        zero_columns=int((~by_row.any(axis=0)).sum()),
        prunable=prunable, dense_bytes=dense,
        bitmask_bytes=min(dense, math.ceil(size / 8) + math.ceil(kept * itemsize)),
        two_four_bytes=math.ceil(size / 2 * itemsize + size / 8) if "2:4" in patterns else dense,
        sparse_bytes=min(dense, math.ceil(kept * (itemsize + 8))),
        zstd_bytes=len(zstandard.ZstdCompressor(level=3).compress(data())), form=form, stated=stated,
    )  # fmt: skip


def find_patterns(nonzero: Array, *, axis: int) -> tuple[str, ...]:
    """The patterns that the zeros of a 2-D array follow along *axis*; none where it has no zeros."""
    if nonzero.all():
        return ()
    found = [spec for spec in (*N_M, *BLOCKS) if parse_pattern(spec).holds(nonzero, axis=axis)]
    for name, across in (("rows", axis), ("columns", 1 - axis)):
        kept = nonzero.any(axis=across, keepdims=True)
        if not (nonzero ^ kept).any():  # every zero belongs to an output (input) of zeros
            found.append(name)
    return tuple(found) or ("unstructured",)


def add_up(rows: Sequence[WeightReport], *, parameters: int, zeros: int, dense_bytes: int) -> Totals:
    """Totals of a file with these *rows* in its table and, over everything, these counts and size."""
    prunable = [row for row in rows if row.prunable]
    entries, empty = sum(row.size for row in prunable), sum(row.zeros for row in prunable)
    rest = dense_bytes - sum(row.dense_bytes for row in rows)
    two_four = any("2:4" in row.patterns for row in rows)
    return Totals(
        parameters=parameters, zeros=zeros, density=1 - zeros / parameters,
        prunable_parameters=entries, prunable_zeros=empty, prunable_density=1 - empty / entries if entries else 1.0,
        dense_bytes=dense_bytes,
        bitmask_bytes=rest + sum(row.bitmask_bytes for row in rows),
        two_four_bytes=rest + sum(row.two_four_bytes for row in rows) if two_four else None,
        sparse_bytes=rest + sum(row.sparse_bytes for row in rows),
        zstd_bytes=rest + sum(row.zstd_bytes for row in rows),
    )  # fmt: skip
