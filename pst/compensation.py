"""What the weights that stay can do for those that go: the layer's outputs on real inputs, kept as near as possible.

With X (tokens, k) the inputs of a layer, H = X'X and W (n, k) its weight, minimize, for W' = 0 outside the mask,

    || X W' ' - X W' ||^2        row by row, so that all rows share H

by the greedy order of SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): the columns one after the other. With
H_j the part of H for the columns j, j+1, ..., a row whose entry j is pruned changes by the optimal brain surgeon's step

    W[j:] -= W[j] / (H_j^-1)[0, 0] * (H_j^-1)[0, :]

and then column j is settled. All these inverses are in one Cholesky factor: the upper U with U'U = H^-1 has
(H_j^-1)[0, :] / sqrt((H_j^-1)[0, 0]) as its row j. The mask is given: any pattern, any scores.
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal of H, as a fraction of its mean: inputs that hardly vary would else make weights large."""
BLOCK = 128
"""Columns that are settled before what follows them is told."""


@torch.no_grad()
def compensate(W: Tensor, H: Tensor, M: Tensor) -> Tensor:
    """W' (n, k): zero where *M* is False, for a weight *W* (n, k) whose inputs have the second moments *H* (k, k).

    Raises ValueError where H is not finite.
    """
    if not bool(torch.isfinite(H).all()):
        raise ValueError("second moments of the inputs hold NaN or infinity")
    U = _factor(H).to(W.dtype)
    k = W.shape[1]
    columns, kept = W.T.clone(memory_format=torch.contiguous_format), M.T.contiguous()  # (k, n): a column is a row here
    for begin in range(0, k, BLOCK):
        end = min(begin + BLOCK, k)
        lost = torch.zeros_like(columns[begin:end])
        for j in range(begin, end):
            lost[j - begin] = columns[j].masked_fill(kept[j], 0.0) / U[j, j]
            columns[j + 1 : end].addr_(U[j, j + 1 : end], lost[j - begin], alpha=-1.0)
        columns[end:].addmm_(U[begin:end, end:].T, lost, alpha=-1.0)
    return columns.masked_fill_(~kept, 0.0).T.contiguous()


def _factor(H: Tensor) -> Tensor:
    """The upper triangular U with U'U = (H + damping)^-1, float64."""
    damped = H.double()
    mean = damped.diagonal().mean()
    damped = damped + torch.diag(torch.full_like(damped.diagonal(), float(DAMPING * mean) or 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def input_scale(H: Tensor) -> Tensor:
    """Q (k): the norm of each input, as a multiple of their mean; ones for inputs that are all zero.

    |W| Q is the score of Wanda (Sun et al. 2023, arXiv 2306.11695): what an entry adds to the outputs, not its size.
    """
    norm = H.diagonal().clamp_min(0).sqrt()
    mean = norm.mean()
    return norm / mean if float(mean) > 0 else torch.ones_like(norm)
