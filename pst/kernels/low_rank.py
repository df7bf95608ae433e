# mypy: disable-error-code="no-untyped-def, misc, no-untyped-call, untyped-decorator"
"""PST's equations (pst/importance.py) for many matrices in one launch, tile by tile.

What a tile needs of W = W0 + beta U V is made in registers, again in the backward pass: neither W nor S is kept.
The gradients of the small tensors are sums over a whole row or column of tiles; one launch goes along the rows for U,
A, R, another along the columns for V, B, C, so that no two programs add to the same number, and the same inputs always
give the same gradients.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pst.kernels.matrices import FIELDS as COLUMNS_OF_TABLE
from pst.kernels.matrices import Matrices
from pst.pending import moved

FIELDS = tl.constexpr(COLUMNS_OF_TABLE)
TILE = (64, 64)
"""Rows and columns of a tile of the forward pass."""
ROWS = {"STRIPE": 64, "STEP": 32, "num_warps": 4, "num_stages": 1}
"""Of the backward pass along the rows: how many rows a program sums over, and how many columns it takes at a time."""
COLUMNS = {"STRIPE": 32, "STEP": 64, "num_warps": 4, "num_stages": 2}
"""The same along the columns. All of these are the fastest of those tried on an H100."""


@triton.jit
def _pointer(table, matrix, field: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + matrix * FIELDS + field)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(dtype))


@triton.jit
def _number(table, matrix, field: tl.constexpr, ALIGNED: tl.constexpr):
    value = tl.load(table + matrix * FIELDS + field).to(tl.int32)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def _load_stored(pointer, stride, rows, columns, n, k, TRANSPOSED: tl.constexpr):
    """A tile (rows, columns) of a matrix that is stored (n, k), or (k, n) when TRANSPOSED, as float32."""
    if TRANSPOSED:
        inside = (columns[:, None] < k) & (rows[None, :] < n)
        tile = tl.load(pointer + columns[:, None] * stride + rows[None, :], mask=inside, other=0.0)
        return tl.trans(tile.to(tl.float32))
    inside = (rows[:, None] < n) & (columns[None, :] < k)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _left(pointer, rows, n, rank: tl.constexpr, RANK: tl.constexpr):
    """Rows of U or A, (rows, RANK), zero beyond the rank."""
    at = tl.arange(0, RANK)
    return tl.load(
        pointer + rows[:, None] * rank + at[None, :], mask=(rows[:, None] < n) & (at[None, :] < rank), other=0.0
    )


@triton.jit
def _right(pointer, columns, k, rank: tl.constexpr, RANK: tl.constexpr):
    """Columns of V or B, (RANK, columns), zero beyond the rank."""
    at = tl.arange(0, RANK)
    return tl.load(
        pointer + at[:, None] * k + columns[None, :], mask=(at[:, None] < rank) & (columns[None, :] < k), other=0.0
    )


@triton.jit
def _masked_kernel(
    table, scalars, tiles, outputs, r2: tl.constexpr, R2: tl.constexpr, OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    matrix = tl.load(tiles + tile * 3)
    n, k = _number(table, matrix, 9, ALIGNED), _number(table, matrix, 10, ALIGNED)
    stride = _number(table, matrix, 11, ALIGNED)
    rows = tl.load(tiles + tile * 3 + 1) * BN + tl.arange(0, BN)
    columns = tl.load(tiles + tile * 3 + 2) * BK + tl.arange(0, BK)
    beta = tl.load(scalars + matrix * 3 + 2)
    w = _load_stored(_pointer(table, matrix, 0, tl.float32, ALIGNED), stride, rows, columns, n, k, TRANSPOSED)
    u = _left(_pointer(table, matrix, 1, tl.float32, ALIGNED), rows, n, r2, R2)
    v = _right(_pointer(table, matrix, 2, tl.float32, ALIGNED), columns, k, r2, R2)
    w += beta * tl.dot(u, v, input_precision=PRECISION)
    inside = (rows[:, None] < n) & (columns[None, :] < k)
    mask = _pointer(table, matrix, 8, tl.int8, ALIGNED) + rows[:, None] * k + columns[None, :]
    w = tl.where(tl.load(mask, mask=inside, other=0) != 0, w, 0.0).to(OUT)
    address = tl.load(outputs + matrix)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    out = address.to(tl.pointer_type(OUT))
    if TRANSPOSED:
        tl.store(
            out + columns[:, None] * stride + rows[None, :],
            tl.trans(w),
            mask=(columns[:, None] < k) & (rows[None, :] < n),
        )
    else:
        tl.store(out + rows[:, None] * stride + columns[None, :], w, mask=inside)


@triton.jit
def _scores_kernel(
    table, scalars, tiles, scores, r1: tl.constexpr, r2: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    matrix = tl.load(tiles + tile * 3)
    n, k = _number(table, matrix, 9, ALIGNED), _number(table, matrix, 10, ALIGNED)
    stride = _number(table, matrix, 11, ALIGNED)
    rows = tl.load(tiles + tile * 3 + 1) * BN + tl.arange(0, BN)
    columns = tl.load(tiles + tile * 3 + 2) * BK + tl.arange(0, BK)
    alpha1, alpha2 = tl.load(scalars + matrix * 3), tl.load(scalars + matrix * 3 + 1)
    beta = tl.load(scalars + matrix * 3 + 2)
    w = _load_stored(_pointer(table, matrix, 0, tl.float32, ALIGNED), stride, rows, columns, n, k, TRANSPOSED)
    u = _left(_pointer(table, matrix, 1, tl.float32, ALIGNED), rows, n, r2, R2)
    v = _right(_pointer(table, matrix, 2, tl.float32, ALIGNED), columns, k, r2, R2)
    w += beta * tl.dot(u, v, input_precision=PRECISION)
    a = _left(_pointer(table, matrix, 3, tl.float32, ALIGNED), rows, n, r1, R1)
    b = _right(_pointer(table, matrix, 4, tl.float32, ALIGNED), columns, k, r1, R1)
    r = tl.load(_pointer(table, matrix, 5, tl.float32, ALIGNED) + rows, mask=rows < n, other=0.0)
    c = tl.load(_pointer(table, matrix, 6, tl.float32, ALIGNED) + columns, mask=columns < k, other=0.0)
    q = tl.load(_pointer(table, matrix, 7, tl.float32, ALIGNED) + columns, mask=columns < k, other=0.0)
    s = tl.abs(w) * q[None, :] + alpha1 * tl.dot(a, b, input_precision=PRECISION)
    s += alpha2 * r[:, None]
    s += alpha2 * c[None, :]
    out = scores + tl.load(table + matrix * FIELDS + 12) + rows[:, None] * k + columns[None, :]
    tl.store(out, s, mask=(rows[:, None] < n) & (columns[None, :] < k))


@triton.jit
def _terms(
    table, grads, matrix, rows, columns, n, k, stride, u, v, beta, G: tl.constexpr,
    TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, MAGNITUDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW and dS of a tile: G * M (+ G * |W|) and G * W."""
    w = _load_stored(_pointer(table, matrix, 0, tl.float32, ALIGNED), stride, rows, columns, n, k, TRANSPOSED)
    w += beta * tl.dot(u, v, input_precision=PRECISION)
    address = tl.load(grads + matrix)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    g = _load_stored(address.to(tl.pointer_type(G)), stride, rows, columns, n, k, TRANSPOSED)
    mask = _pointer(table, matrix, 8, tl.int8, ALIGNED) + rows[:, None] * k + columns[None, :]
    keep = tl.load(mask, mask=(rows[:, None] < n) & (columns[None, :] < k), other=0) != 0
    dw = tl.where(keep, g, 0.0)
    if MAGNITUDE:
        dw += g * tl.abs(w)
    return dw, g * w


@triton.jit
def _rows_kernel(
    table, scalars, tiles, grads, results, r1: tl.constexpr, r2: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    G: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, MAGNITUDE: tl.constexpr,
    STRIPE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dU = beta dW V', dA = alpha1 dS B', dR = alpha2 (sum of dS over the columns), for STRIPE rows of one matrix."""
    tile = tl.program_id(0)
    matrix = tl.load(tiles + tile * 3)
    n, k = _number(table, matrix, 9, ALIGNED), _number(table, matrix, 10, ALIGNED)
    stride = _number(table, matrix, 11, ALIGNED)
    rows = tl.load(tiles + tile * 3 + 1) * STRIPE + tl.arange(0, STRIPE)
    beta = tl.load(scalars + matrix * 3 + 2)
    u = _left(_pointer(table, matrix, 1, tl.float32, ALIGNED), rows, n, r2, R2)
    dU = tl.zeros((STRIPE, R2), dtype=tl.float32)
    dA = tl.zeros((STRIPE, R1), dtype=tl.float32)
    dR = tl.zeros((STRIPE,), dtype=tl.float32)
    for start in range(0, k, STEP):
        columns = start + tl.arange(0, STEP)
        v = _right(_pointer(table, matrix, 2, tl.float32, ALIGNED), columns, k, r2, R2)
        b = _right(_pointer(table, matrix, 4, tl.float32, ALIGNED), columns, k, r1, R1)
        dw, ds = _terms(
            table, grads, matrix, rows, columns, n, k, stride, u, v, beta, G, TRANSPOSED, ALIGNED, MAGNITUDE, PRECISION
        )
        dU += tl.dot(dw, tl.trans(v), input_precision=PRECISION)
        dA += tl.dot(ds, tl.trans(b), input_precision=PRECISION)
        dR += tl.sum(ds, 1)
    at2, at1 = tl.arange(0, R2), tl.arange(0, R1)
    there = rows < n
    out = tl.load(results + matrix * 6).to(tl.pointer_type(tl.float32))
    tl.store(out + rows[:, None] * r2 + at2[None, :], beta * dU, mask=there[:, None] & (at2[None, :] < r2))
    out = tl.load(results + matrix * 6 + 2).to(tl.pointer_type(tl.float32))
    alpha1, alpha2 = tl.load(scalars + matrix * 3), tl.load(scalars + matrix * 3 + 1)
    tl.store(out + rows[:, None] * r1 + at1[None, :], alpha1 * dA, mask=there[:, None] & (at1[None, :] < r1))
    out = tl.load(results + matrix * 6 + 4).to(tl.pointer_type(tl.float32))
    tl.store(out + rows, alpha2 * dR, mask=there)


@triton.jit
def _columns_kernel(
    table, scalars, tiles, grads, results, r1: tl.constexpr, r2: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    G: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr, MAGNITUDE: tl.constexpr,
    STRIPE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = beta U' dW, dB = alpha1 A' dS, dC = alpha2 (sum of dS over the rows), for STRIPE columns of one matrix."""
    tile = tl.program_id(0)
    matrix = tl.load(tiles + tile * 3)
    n, k = _number(table, matrix, 9, ALIGNED), _number(table, matrix, 10, ALIGNED)
    stride = _number(table, matrix, 11, ALIGNED)
    columns = tl.load(tiles + tile * 3 + 2) * STRIPE + tl.arange(0, STRIPE)
    beta = tl.load(scalars + matrix * 3 + 2)
    v = _right(_pointer(table, matrix, 2, tl.float32, ALIGNED), columns, k, r2, R2)
    dV = tl.zeros((R2, STRIPE), dtype=tl.float32)
    dB = tl.zeros((R1, STRIPE), dtype=tl.float32)
    dC = tl.zeros((STRIPE,), dtype=tl.float32)
    for start in range(0, n, STEP):
        rows = start + tl.arange(0, STEP)
        u = _left(_pointer(table, matrix, 1, tl.float32, ALIGNED), rows, n, r2, R2)
        a = _left(_pointer(table, matrix, 3, tl.float32, ALIGNED), rows, n, r1, R1)
        dw, ds = _terms(
            table, grads, matrix, rows, columns, n, k, stride, u, v, beta, G, TRANSPOSED, ALIGNED, MAGNITUDE, PRECISION
        )
        dV += tl.dot(tl.trans(u), dw, input_precision=PRECISION)
        dB += tl.dot(tl.trans(a), ds, input_precision=PRECISION)
        dC += tl.sum(ds, 0)
    at2, at1 = tl.arange(0, R2), tl.arange(0, R1)
    there = columns < k
    out = tl.load(results + matrix * 6 + 1).to(tl.pointer_type(tl.float32))
    tl.store(out + at2[:, None] * k + columns[None, :], beta * dV, mask=(at2[:, None] < r2) & there[None, :])
    out = tl.load(results + matrix * 6 + 3).to(tl.pointer_type(tl.float32))
    alpha1, alpha2 = tl.load(scalars + matrix * 3), tl.load(scalars + matrix * 3 + 1)
    tl.store(out + at1[:, None] * k + columns[None, :], alpha1 * dB, mask=(at1[:, None] < r1) & there[None, :])
    out = tl.load(results + matrix * 6 + 5).to(tl.pointer_type(tl.float32))
    tl.store(out + columns, alpha2 * dC, mask=there)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Of masked weights, and of their gradients."""


def masked_weights(
    matrices: Matrices, outputs: Sequence[Tensor], *, addresses: Tensor | None = None, precision: str = "tf32x3"
) -> None:
    """Write M * (W0 + beta U V) of each matrix to its *outputs*, laid out and strided as W0, of one dtype of TYPES.

    addresses: of the outputs, (matrices,) int64 on the device, where the caller knows them already.
    """
    rows, columns = TILE
    tiles = matrices.tiles(rows, columns)
    _masked_kernel[(len(tiles),)](
        matrices.table, matrices.scalars, tiles, addresses_of(outputs) if addresses is None else addresses,
        matrices.r2, _padded(matrices.r2), TYPES[outputs[0].dtype], matrices.axis == 0, _wide(matrices, outputs),
        rows, columns, precision,
    )  # fmt: skip


def scores(matrices: Matrices, *, precision: str = "tf32x3") -> Tensor:
    """S of all matrices, one behind the other, each by rows: (matrices.offsets[-1],) float32."""
    rows, columns = TILE
    tiles = matrices.tiles(rows, columns)
    found = torch.empty(matrices.offsets[-1], dtype=torch.float32, device=matrices.device)
    _scores_kernel[(len(tiles),)](
        matrices.table, matrices.scalars, tiles, found, matrices.r1, matrices.r2, _padded(matrices.r1),
        _padded(matrices.r2), matrices.axis == 0, matrices.aligned, rows, columns, precision,
    )  # fmt: skip
    return found


def gradients(
    matrices: Matrices, grads: Sequence[Tensor], *, addresses: Tensor | None = None, precision: str = "ieee"
) -> list[Tensor]:
    """Gradients of ``matrices.trained``, in its order, from G = dL/d(M * W) of each, laid out and strided as W0.

    addresses: of *grads*, as in ``masked_weights``. The results are parts of one tensor.
    """
    starts, begins = matrices.result_layout
    flat = torch.empty(starts[-1], dtype=torch.float32, device=matrices.device)
    results = [
        flat[start : start + tensor.numel()].view(tensor.shape)
        for start, tensor in zip(starts, matrices.trained, strict=False)
    ]
    where = begins + flat.data_ptr()
    which = addresses_of(grads) if addresses is None else addresses
    options = (
        matrices.r1, matrices.r2, _padded(matrices.r1), _padded(matrices.r2), TYPES[grads[0].dtype],
        matrices.axis == 0, _wide(matrices, grads), matrices.magnitude_gradient,
    )  # fmt: skip
    for kernel, tiles, shape in (
        (_rows_kernel, matrices.tiles(ROWS["STRIPE"], 0), ROWS),
        (_columns_kernel, matrices.tiles(0, COLUMNS["STRIPE"]), COLUMNS),
    ):
        grid = (len(tiles),)
        kernel[grid](matrices.table, matrices.scalars, tiles, which, where, *options, PRECISION=precision, **shape)
    return results


def addresses_of(tensors: Sequence[Tensor]) -> Tensor:
    """Where *tensors* lie, (tensors,) int64 on their device."""
    found = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    return moved(found, tensors[0].device)


def _wide(matrices: Matrices, tensors: Sequence[Tensor]) -> bool:
    return matrices.aligned and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _padded(rank: int) -> int:
    """The next power of two that a matrix product takes."""
    return max(16, 1 << (rank - 1).bit_length())
