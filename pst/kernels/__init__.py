"""The mathematics of PST for all weights of a model at once, on a GPU, in Triton.

A transformer has dozens of matrices under masks. One after the other, each step would start thousands of small kernels
and wait for the processor; here a table says where every matrix and its tensors lie (matrices.py), and one launch does
one thing for all of them:

    low_rank.py     M * (W0 + beta U V), the scores S, and the gradients of U, V, A, B, R, C from G
    selection.py    exactly the count of lowest scores of each matrix, by radix selection; N:M within registers

pst/importance.py and pst/patterns/ in plain torch are the oracle of these and the path of every other device. Importing
this package needs neither Triton nor a GPU.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from pst.progress import note

if TYPE_CHECKING:
    import torch

_forced: bool | None = None


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def usable(device: "torch.device") -> bool:
    """Whether work on *device* is done by these kernels."""
    if _forced is not None:
        return _forced
    return device.type == "cuda" and installed() and works(device)


@cache
def works(device: "torch.device") -> bool:
    """Whether a small kernel gives the right answer on *device*; where it does not, that is noted once.

    Triton needs a C compiler besides the driver, and a GPU of compute capability 8.0 or so.
    """
    import torch

    from pst.kernels.selection import Segments, keep_n_of_m

    try:
        scores = torch.tensor([3.0, 1.0, 4.0, 2.0], device=device)
        keep, _, _ = keep_n_of_m(scores, Segments([4], device), 2, 4, lost=False)
        found = keep.tolist() == [True, False, True, False]
        reason = "" if found else "a test gave a wrong answer"
    except Exception as error:  # whatever the compiler, the driver or the launcher says
        found, reason = False, (str(error).strip() or type(error).__name__).splitlines()[0]
    if not found:
        note(f"Triton's kernels cannot be used here ({reason}); plain torch does the same, slower.")
    return found


@contextmanager
def forced(use: bool) -> Iterator[None]:
    """Within: the kernels are used on every device, or on none. On the CPU they need Triton's interpreter."""
    global _forced
    before, _forced = _forced, use
    try:
        yield
    finally:
        _forced = before
