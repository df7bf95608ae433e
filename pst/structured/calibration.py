"""Calibration of units: what a layer loses with each, and what those that stay can make up for.

With W_u the columns of a unit in its consumer and H = X'X of the consumer's inputs (damped, as in pst/compensation.py),
the outputs on those inputs lose at least

    E_u = trace(W_u ((H^-1)_uu)^-1 W_u')

if u alone goes and the rest is adjusted: the optimal brain surgeon's step for several columns, as ZipLM uses it (Kurtic
et al. 2023, arXiv 2302.04089). Heads and neurons of all layers add to one residual stream, so their E_u are compared
as they are. Q of the consumer's columns makes the pooled |W| Q of a unit E_u over its cost, in units of the mean over
the model; Q of producers is 0. Then, with K the columns that stay, least squares for all rows at once:

    W'_K = W H_:K (H_KK)^-1
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from pst.calibration import Adjustable, Calibrated, Calibration
from pst.compensation import damped_moments
from pst.errors import ModelError
from pst.masked_weight import MaskedWeight, mean_magnitude
from pst.structured.choose import masked_matrix, pattern_of
from pst.structured.units import find_units


class UnitCalibration(Calibration):
    """The stages of a run with pattern structured."""

    def fold_(self, part: Adjustable, piece: Tensor) -> None:
        """Take up the update of *piece*, that of units which are out included: they may come back."""
        part.fold_(piece)

    def scale_(self, model: nn.Module, parts: list[Calibrated]) -> None:
        """See scale_units_."""
        scale_units_(model, {part: (piece, H) for part, piece, H in parts})

    def compensated(self, part: Adjustable, piece: Tensor, H: Tensor) -> Tensor:
        """See compensate_unit."""
        return compensate_unit(part.by_row(piece), H, part.mask)


@torch.no_grad()
def scale_units_(model: nn.Module, moments: Mapping[MaskedWeight, tuple[Tensor, Tensor]]) -> None:
    """Set Q of every matrix of a sparsified model: of consumers from E_u, else 0.

    *moments*: of each matrix its original as stored, and H (k, k). Raises ModelError where an H is not finite.
    """
    units, target = find_units(model), pattern_of(model).target
    for part in moments:
        cast(Tensor, part.Q).zero_()
    found = []
    for one in units:
        part, _ = masked_matrix(one.consumer)
        piece, H = moments[part]
        try:
            found.append((one, part, piece, unit_losses(part.by_row(piece), H, one.consumer.width)))
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise ModelError(
                f"The inputs by which {one.name} are judged cannot be used ({error}): training diverged, or the model "
                "came so. Use a lower learning rate, another model, or no calibration."
            ) from error
    cost = sum(one.count * one.cost(target) for one in units)
    mean = sum(float(E.sum()) for _, _, _, E in found) / cost  # a loss for each multiply-add
    for one, part, piece, E in found:
        size = part.by_row(piece).abs().sum(0).view(one.count, -1).sum(1)
        Q = torch.where(size > 0, E.to(size) / max(mean, 1e-30) * mean_magnitude(piece) / size, 0.0)
        cast(Tensor, part.Q).copy_(Q.repeat_interleave(one.consumer.width))


def compensate_unit(W: Tensor, H: Tensor, M: Tensor) -> Tensor:
    """A consumer's W' by least squares; a producer's *W* as it is, since none of its inputs goes."""
    keep = M[0]
    return W if bool(keep.all()) else least_squares(W, H, keep)


@torch.no_grad()
def unit_losses(W: Tensor, H: Tensor, width: int) -> Tensor:
    """E_u (k / width), float64, for a weight *W* (n, k) whose units are *width* columns each.

    Raises ValueError where *H* (k, k) is not finite.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped_moments(H)))
    count = W.shape[1] // width
    blocks = inverse.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (count, width, width)
    columns = W.double().view(-1, count, width).permute(1, 2, 0)  # (count, width, n): W_u'
    losses: Tensor = (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
    return losses


@torch.no_grad()
def least_squares(W: Tensor, H: Tensor, keep: Tensor) -> Tensor:
    """W' (n, k), zero in the columns that *keep* (k) leaves out. Raises ValueError where *H* (k, k) is not finite."""
    damped = damped_moments(H)
    factor = torch.linalg.cholesky(damped[keep][:, keep])
    adjusted = torch.zeros_like(W)
    adjusted[:, keep] = torch.cholesky_solve(damped[keep] @ W.double().T, factor).T.to(W.dtype)
    return adjusted
