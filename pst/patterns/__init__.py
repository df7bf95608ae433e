"""What shape survives: one file a pattern, found by its name.

A pattern turns scores into a mask and knows nothing of where the scores came from. It works along the reduction
axis of a weight: the one that a matrix product sums over (dim 1 of nn.Linear, dim 0 of GPT-2's Conv1D, the K axis
of ONNX MatMul and Gemm). Adding one is adding a file here that defines ``parse(spec)``.

Importing this package needs numpy alone; torch is used only by ``mask``, on tensors that the caller brings.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pst.errors import PatternError

if TYPE_CHECKING:
    from torch import Tensor


class Pattern(Protocol):
    """A rule for which entries of a matrix may be non-zero."""

    spec: str
    """As typed by the user and as stored: ``unstructured``, ``2:4``, ``block:1x4``."""
    sparsity: float | None
    """The fraction of zeros that the pattern fixes, or None where the user chooses it."""
    example: str
    """How a user asks for such a pattern, for error messages."""

    def mask(self, scores: "Tensor", sparsity: float, *, axis: int) -> "Tensor":
        """Keep the highest *scores*: a bool tensor of their shape, True = kept, with an exact count of False.

        Scores must be finite. *axis* is the reduction axis of the 2-D scores. Where scores are pooled (blocks, groups),
        the straight-through gradient of a method still goes to each entry, dL/dS := dL/dM: see pst/patterns/block.py.
        """

    def holds(self, weight: "np.ndarray[Any, Any]", *, axis: int) -> bool:
        """Whether the zeros of a 2-D *weight* follow the pattern along *axis*, whoever made it."""

    def check(self, shape: tuple[int, ...], *, axis: int, name: str) -> None:
        """Raise PatternError when a weight of this *shape*, called *name* in the message, cannot hold the pattern."""


@runtime_checkable
class BatchPattern(Pattern, Protocol):
    """A pattern that chooses the masks of many matrices in a few launches, where a GPU waits for launches."""

    def masks(self, scores: "Sequence[Tensor]", sparsities: Sequence[float]) -> "tuple[list[Tensor], Tensor | None]":
        """As ``mask`` of each of *scores* with axis 1, all on one device, at its sparsity.

        The second result is None where all scores were found finite. Where that would have meant to wait for a GPU it
        is (scores,) int32 there, not 0 for scores that are not finite, whose mask means nothing.
        """


def masks(
    pattern: Pattern, scores: "Sequence[Tensor]", sparsities: Sequence[float]
) -> "tuple[list[Tensor], Tensor | None]":
    """The mask of each of *scores* (n, k), whose axis 1 is the reduction axis, at its sparsity: see BatchPattern."""
    if isinstance(pattern, BatchPattern):
        return pattern.masks(scores, sparsities)
    return [pattern.mask(each, sparsity, axis=1) for each, sparsity in zip(scores, sparsities, strict=True)], None


@runtime_checkable
class SharingPattern(Pattern, Protocol):
    """A pattern that leaves a matrix free in how many of its units stay, so that several can share one budget."""

    def units(self, scores: "Tensor", *, axis: int) -> "Tensor":
        """The scores of what stays or goes as one (an entry, a tile), in any shape; ``mask`` drops int(units s)."""


def sharing(pattern: Pattern) -> SharingPattern:
    """*pattern*, for a budget over all weights. Raises PatternError where its ratio holds in each weight by itself."""
    if not isinstance(pattern, SharingPattern):
        raise PatternError(
            f"Pattern {pattern.spec} fixes the ratio inside every weight, so that a global budget has nothing to "
            "share out; use --set budget=local, or --pattern unstructured."
        )
    return pattern


def parse_pattern(spec: str) -> Pattern:
    """The pattern that *spec* names. Raises PatternError for one that no file here knows."""
    examples = []
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        pattern: Pattern | None = module.parse(spec)
        if pattern is not None:
            return pattern
        examples.append(module.EXAMPLE)
    raise PatternError(f"Unknown pattern {spec!r}; use one of {', '.join(sorted(examples))}.")


def check_sparsity(sparsity: float) -> None:
    """Raise PatternError unless 0 <= *sparsity* < 1."""
    if not 0.0 <= sparsity < 1.0:
        raise PatternError(f"Sparsity {sparsity:g} is outside [0, 1); 0.9 means that 90% of the weights become zero.")
