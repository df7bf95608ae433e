"""To which shape a batch is filled up, so that an engine runs the kernels that it prepared for that shape.

A general kernel serves every shape, one that was chosen for a single shape is quicker at that shape, and what is
launched there again and again can become a CUDA graph. Padding is masked, and rows do not see each other, so that the
answers stay the same but for rounding.
"""

from collections.abc import Sequence

Shape = tuple[int, int]
"""Batch x tokens."""
MOST = 2
"""A batch is filled up to at most so many times its tokens: beyond, a general kernel has too little to do to lose."""


def filled_shape(shape: Shape, prepared: Sequence[Shape]) -> Shape:
    """The smallest of *prepared* that holds *shape*, if it has at most MOST times its tokens; else *shape* itself."""
    rows, tokens = shape
    fitting = [
        each for each in prepared
        if each[0] >= rows and each[1] >= tokens and each[0] * each[1] <= MOST * rows * tokens
    ]  # fmt: skip
    return min(fitting, key=lambda each: (each[0] * each[1], each), default=shape)
