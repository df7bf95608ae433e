"""What the weights that stay can do for those that go: the layer's outputs on real inputs, kept as near as possible.

With X (tokens, k) the inputs of a layer, H = X'X and W (n, k) its weight, minimize

    || X W' ' - X W' ||^2 + lambda || W' - W ||^2        over W' = 0 outside the mask M, and over the masks of a pattern

in two steps, as ALPS does (Meng et al. 2024, arXiv 2406.07831):

    refine       M by operator splitting (ADMM). Z = W M at the start, D = 0; then, as often as STEPS says, V is the
                 minimum of the above over all W' plus rho || V - Z + D ||^2, M is chosen anew by the size of V + D,
                 Z = (V + D) M, and D := D + V - Z. Columns are measured in units of their inputs' norm, and rho is 1.
    compensate   W' for that M exactly, all rows at once, by conjugate gradients preconditioned with the diagonal.

Arithmetic is float64, which a GPU does not round to TF32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01
"""lambda, as a fraction of the mean of the diagonal of H: inputs that hardly vary would else make weights large."""
STEPS = 10
"""Of ADMM. More of them hardly change the mask (LOG.md)."""
MOST_STEPS = 60
"""Of conjugate gradients, at most."""
TOLERANCE = 1e-3
"""Conjugate gradients end when the residual of each row is this fraction of its first."""


@torch.no_grad()
def compensate(W: Tensor, H: Tensor, M: Tensor) -> Tensor:
    """W' (n, k): zero where *M* is False, for a weight *W* (n, k) whose inputs have the second moments *H* (k, k).

    Raises ValueError where H is not finite.
    """
    damped = damped_moments(H)
    scale = damped.diagonal()
    target = W.double()
    made = target * M
    residual = (target - made) @ damped * M
    step = residual / scale
    energy = first = (residual * step).sum(1)  # (n), of the residual in the norm of the preconditioner
    for _ in range(MOST_STEPS):
        if bool((energy <= TOLERANCE**2 * first).all()):
            break
        curved = step @ damped * M
        length = _ratio(energy, (step * curved).sum(1))
        made += length * step
        residual -= length * curved
        conditioned = residual / scale
        before, energy = energy, (residual * conditioned).sum(1)
        step = conditioned + _ratio(energy, before) * step
    return made.to(W.dtype)


@torch.no_grad()
def refine(W: Tensor, H: Tensor, M: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """A mask (n, k) under which ``compensate`` comes nearer to the outputs of *W* (n, k) than under *M*, its start.

    As a rule: nothing is promised, least of all where scores are pooled (blocks). *choose* makes a mask of scores
    (n, k), which are |W| Q for a weight that is not pruned yet, Q being input_scale(H).

    Raises ValueError where *H* (k, k) is not finite, torch.linalg.LinAlgError where it has no inverse.
    """
    damped = damped_moments(H)
    norm = damped.diagonal().sqrt()
    scaled = damped / norm / norm.unsqueeze(1)
    target = W.double() * norm
    fixed = target @ scaled
    scaled.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    unit = norm.mean()
    Z, D = target * M, torch.zeros_like(target)
    for _ in range(STEPS):
        V = (fixed + Z - D) @ inverse
        D += V
        M = choose((D.abs() / unit).to(W.dtype))
        Z = D * M
        D -= Z
    return M


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """(n, 1); 0 for rows that have arrived."""
    return torch.where(below > 0, above / below, 0.0).unsqueeze(1)


def damped_moments(H: Tensor) -> Tensor:
    """H + lambda (k, k), float64. Raises ValueError where H is not finite."""
    if not bool(torch.isfinite(H).all()):
        raise ValueError("second moments of the inputs hold NaN or infinity")
    damped = H.double()
    mean = float(damped.diagonal().mean())
    return damped + torch.diag(torch.full_like(damped.diagonal(), DAMPING * mean or 1.0))


def input_scale(H: Tensor) -> Tensor:
    """Q (k): the norm of each input, as a multiple of their mean; ones for inputs that are all zero.

    |W| Q is the score of Wanda (Sun et al. 2023, arXiv 2306.11695): what an entry adds to the outputs, not its size.
    """
    norm = H.diagonal().clamp_min(0).sqrt()
    mean = norm.mean()
    return norm / mean if float(mean) > 0 else torch.ones_like(norm)
