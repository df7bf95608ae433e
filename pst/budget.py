"""One budget for all weights: how many of its units each matrix loses when their scores compete with each other.

The total is what the local budget would give, the sum of int(units s) over the matrices, so that both budgets compare
at equal counts; only the shares differ. No matrix is emptied: each keeps at least FLOOR of what its local share keeps.
Which units of a matrix go is the pattern's matter: these are its lowest scores either way.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOOR = 0.1
"""Share of the units that a matrix would keep at the common sparsity, and that it keeps in any case."""


def allocate(units: Sequence[Tensor], sparsity: float) -> list[int]:
    """How many units each matrix loses, from their finite scores on a common scale, one tensor a matrix.

    The units of lowest score go, over all matrices, as long as their matrix is above its floor. Ties: of equal scores
    the later matrix loses its units first.
    """
    sizes = [each.numel() for each in units]
    local = [int(size * sparsity) for size in sizes]
    most = [size - math.ceil(FLOOR * (size - zeros)) for size, zeros in zip(sizes, local, strict=True)]
    counts = [0] * len(units)
    competing, left = list(range(len(units))), sum(local)
    while left:  # a matrix at its floor leaves the competition, which can only raise the threshold of the others
        found = _lowest([units[i] for i in competing], left)
        beyond = {i for i, count in zip(competing, found, strict=True) if count > most[i]}
        for i, count in zip(competing, found, strict=True):
            counts[i] = most[i] if i in beyond else count
        if not beyond:
            break
        left -= sum(most[i] for i in beyond)
        competing = [i for i in competing if i not in beyond]
    return counts


def _lowest(units: Sequence[Tensor], count: int) -> list[int]:
    """How many of the *count* lowest of all values lie in each tensor."""
    flat = torch.cat([each.detach().reshape(-1) for each in units])
    flat = flat if flat.dtype == torch.float64 else flat.float()
    threshold = _kth_by_partition(flat, count) if flat.device.type == "cpu" else _kth_by_bisection(flat, count)
    pieces = torch.split(flat, [each.numel() for each in units])
    below = torch.stack([(piece < threshold).sum() for piece in pieces]).tolist()
    tied = torch.stack([(piece == threshold).sum() for piece in pieces]).tolist()
    missing = count - sum(below)
    counts = []
    for under, equal in zip(reversed(below), reversed(tied), strict=True):
        taken = min(missing, equal)
        missing -= taken
        counts.append(int(under + taken))
    return counts[::-1]


def _kth_by_partition(flat: Tensor, count: int) -> float:
    """The count-th lowest value, on the CPU."""
    return float(np.partition(flat.numpy(), count - 1)[count - 1])


def _kth_by_bisection(flat: Tensor, count: int) -> float:
    """The count-th lowest value, for the GPU: exact, by one count over all values for each bit of a float.

    A sort would need twice the memory for its indices, which nobody asks for here. In between, *flat* holds integers
    in the order of its values.
    """
    integer, bits = (torch.int64, 64) if flat.dtype == torch.float64 else (torch.int32, 32)
    largest = 2 ** (bits - 1) - 1
    keys = flat.view(integer)
    keys.bitwise_xor_((keys >> (bits - 1)).bitwise_and_(largest))
    low, high = -largest - 1, largest
    while low < high:
        middle = (low + high) // 2
        if int((keys <= middle).sum()) >= count:
            high = middle
        else:
            low = middle + 1
    keys.bitwise_xor_((keys >> (bits - 1)).bitwise_and_(largest))  # its own inverse
    key = torch.tensor(low, dtype=integer)
    return float(key.bitwise_xor((key >> (bits - 1)).bitwise_and(largest)).view(flat.dtype))
