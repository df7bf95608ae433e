"""Where the tensors of many matrices lie, as tables that a kernel can read.

A row of ``table`` (matrices, FIELDS) int64 holds the addresses of one matrix's tensors and its shape; ``scalars``
(matrices, 3) float32 its alpha1, alpha2, beta. W0 and what is made of it keep the storage of the module, (n, k) or
(k, n), maybe as a part of a larger tensor; everything else is (n, k) by rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pst.masked_weight import MaskedLowRank

NAMES = ("U", "V", "A", "B", "R", "C")
"""What trains, in the order in which gradients come."""
FIELDS = 16
"""W0, U, V, A, B, R, C, Q, mask: addresses; then n, k, stride of W0 along its slow dimension, first flat index."""


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """Matrices that one launch can serve: same ranks, same storage, same device, float32."""

    parts: tuple[MaskedLowRank, ...]
    stored: tuple[Tensor, ...]
    """W0 of each, as stored; a view where several lie side by side."""
    axis: int
    r1: int
    r2: int
    magnitude_gradient: bool

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """(n, k) of each."""
        return [(int(part.mask.shape[0]), int(part.mask.shape[1])) for part in self.parts]

    @cached_property
    def offsets(self) -> list[int]:
        """Where each matrix begins when all lie one behind the other by rows; the last is the total."""
        found = [0]
        for n, k in self.shapes:
            found.append(found[-1] + n * k)
        return found

    @cached_property
    def device(self) -> torch.device:
        """Of every tensor."""
        return self.stored[0].device

    @cached_property
    def trained(self) -> tuple[Tensor, ...]:
        """U, V, A, B, R, C of the first matrix, then of the second, and so on."""
        return tuple(getattr(part, name) for part in self.parts for name in NAMES)

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of every tensor in the table, to see whether it still tells the truth."""
        return self.present_addresses()

    def present_addresses(self) -> tuple[int, ...]:
        """The same, as they are now."""
        return tuple(
            tensor.data_ptr()
            for tensors in (self.stored, self.trained, [part.Q for part in self.parts], [p.mask for p in self.parts])
            for tensor in tensors
        )

    @cached_property
    def table(self) -> Tensor:
        """(matrices, FIELDS) int64."""
        rows = []
        for part, W0, (n, k), offset in zip(self.parts, self.stored, self.shapes, self.offsets, strict=False):
            tensors = (W0, *(getattr(part, name) for name in NAMES), part.Q, part.mask)
            row = [*(tensor.data_ptr() for tensor in tensors), n, k, W0.stride(0), offset]
            rows.append(row + [0] * (FIELDS - len(row)))
        return torch.tensor(rows, dtype=torch.int64).to(self.device)

    @cached_property
    def scalars(self) -> Tensor:
        """(matrices, 3) float32: alpha1, alpha2, beta."""
        rows = [[part.scales.alpha1, part.scales.alpha2, part.scales.beta] for part in self.parts]
        return torch.tensor(rows, dtype=torch.float32).to(self.device)

    @cached_property
    def aligned(self) -> bool:
        """Whether every row begins at 16 bytes, so that loads can be wide."""
        sizes = [size for W0, shape in zip(self.stored, self.shapes, strict=True) for size in (*shape, W0.stride(0))]
        wide = all(size % 16 == 0 for size in sizes)
        return wide and all(address % 16 == 0 for address in self.addresses)

    @cached_property
    def result_layout(self) -> tuple[list[int], Tensor]:
        """Where the gradient of each of ``trained`` begins in one float32 tensor: elements with the total, and bytes.

        The bytes are int64 on the device; every gradient begins at 16 of them.
        """
        starts = [0]
        for tensor in self.trained:
            starts.append(starts[-1] + -(-tensor.numel() // 4) * 4)
        return starts, (torch.tensor(starts[:-1], dtype=torch.int64) * 4).to(self.device)

    def tiles(self, rows: int, columns: int) -> Tensor:
        """(tiles, 3) int32: matrix, tile row, tile column, for tiles of *rows* x *columns*; 0 = as long as it is."""
        key = (rows, columns)
        if key not in self._tiles:
            found = [
                (matrix, i, j)
                for matrix, (n, k) in enumerate(self.shapes)
                for i in range(-(-n // rows) if rows else 1)
                for j in range(-(-k // columns) if columns else 1)
            ]
            self._tiles[key] = torch.tensor(found, dtype=torch.int32).to(self.device)
        return self._tiles[key]

    @cached_property
    def _tiles(self) -> dict[tuple[int, int], Tensor]:
        return {}


def serves(part: object, W0: Tensor) -> bool:
    """Whether the kernels can take this matrix: PST's, float32, W0 frozen and laid out by rows of its storage."""
    if not isinstance(part, MaskedLowRank) or W0.requires_grad or W0.stride(1) != 1:
        return False
    own = (*part.parameters(), part.Q)
    indexable = part.mask.numel() < 2**31  # the kernels count entries in 32 bits
    return indexable and W0.dtype == torch.float32 and all(t.dtype == torch.float32 and t.is_contiguous() for t in own)


def kind(part: MaskedLowRank, W0: Tensor) -> tuple[object, ...]:
    """Matrices of the same kind can share a launch."""
    return part.axis, part.A.shape[1], part.U.shape[1], part.scales.magnitude_gradient, W0.device


def together(found: Sequence[tuple[MaskedLowRank, Tensor]]) -> Matrices:
    """Matrices of one kind: each with its W0, as stored."""
    part = found[0][0]
    return Matrices(
        parts=tuple(part for part, _ in found),
        stored=tuple(W0 for _, W0 in found),
        axis=part.axis,
        r1=int(part.A.shape[1]),
        r2=int(part.U.shape[1]),
        magnitude_gradient=part.scales.magnitude_gradient,
    )
