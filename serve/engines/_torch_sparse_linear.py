"""nn.Linear with a 2:4 weight as one operator of PyTorch: cuSPARSELt's product, by the algorithm its search found.

``pst::linear_2of4(packed, value, bias, outputs)``: packed as torch._cslt_compress makes it of W (outputs, inputs),
value (..., inputs), bias (outputs) or None; gives value W^T + bias, (..., outputs). Its result lies in columns, as
cuSPARSELt writes it (outputs, tokens): an activation or another product reads that as it is, and torch.compile takes
it up into what it fuses. Tokens are filled up to what cuSPARSELt takes.

PyTorch's own sparse tensors multiply by the default algorithm, and by one for all numbers of tokens. A search takes
about a second for each size, and is made for announced shapes alone.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pst.errors import EngineError
from serve.engines._torch_products import TOKENS_MULTIPLE, check_product

Algorithm = tuple[int, int, int]
"""Its number, split_k and the mode of that, as torch._cslt_sparse_mm takes them."""
DEFAULT: Algorithm = (0, 1, -1)


class Algorithms:
    """What searches found, for the whole process."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int, bool], Algorithm] = {}
        self._searches = False

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Within: a product of a size that was not met before is searched. Not while a CUDA graph is recorded."""
        self._searches = True
        try:
            yield
        finally:
            self._searches = False

    def of(self, torch: Any, packed: Any, value: Any, bias: Any, outputs: int) -> Algorithm:
        """For *value* (inputs, tokens); the default where nothing was found."""
        key = (outputs, *value.shape, value.is_contiguous())
        if key not in self._found and self._searches:
            self._found[key] = _searched(torch, packed, value, bias)
        return self._found.get(key, DEFAULT)

    def __len__(self) -> int:
        """Sizes that were searched."""
        return len(self._found)


ALGORITHMS = Algorithms()


def _searched(torch: Any, packed: Any, value: Any, bias: Any) -> Algorithm:
    """What cuSPARSELt finds fastest; the default where it fails, or computes something else."""
    try:
        number, split_k, mode, *_ = torch._C._cusparselt.mm_search(packed, value, bias, None, None, False)
        chosen = (int(number), int(split_k), int(mode))
        found, expected = (product(torch, packed, value, bias, each) for each in (chosen, DEFAULT))
        check_product(found, expected)
    except (RuntimeError, AttributeError, EngineError):  # AttributeError: an older PyTorch has no such search
        return DEFAULT
    return chosen


def product(torch: Any, packed: Any, value: Any, bias: Any, algorithm: Algorithm) -> Any:
    """(outputs, tokens), contiguous; *value* (inputs, tokens)."""
    return torch._cslt_sparse_mm(packed, value, bias, None, None, False, *algorithm)


def linear(torch: Any, packed: Any, value: Any, bias: Any, outputs: int) -> Any:
    """What the operator computes."""
    rows = value.reshape(-1, value.shape[-1])
    filled = _filled(rows.shape[0])
    if filled != rows.shape[0]:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, filled - rows.shape[0]))
    columns = rows.t()
    if not (columns.is_contiguous() or rows.is_contiguous()):
        columns = rows.contiguous().t()
    found = product(torch, packed, columns, bias, ALGORITHMS.of(torch, packed, columns, bias, outputs))
    return found.as_strided(*_layout(value.shape, outputs))


def _filled(tokens: int) -> int:
    return (tokens + TOKENS_MULTIPLE - 1) // TOKENS_MULTIPLE * TOKENS_MULTIPLE


def _layout(shape: Sequence[int], outputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of the result for a value of *shape*."""
    *front, _ = shape
    strides: list[int] = []
    tokens = 1
    for size in reversed(front):
        strides.insert(0, tokens)
        tokens = tokens * size
    return (*front, outputs), (*strides, _filled(tokens))


@functools.cache
def operator(torch: Any) -> Any:
    """The operator, registered once for the process; torch.compile takes its shapes from the second function."""
    library = torch.library.Library("pst", "FRAGMENT")
    library.define("linear_2of4(Tensor packed, Tensor value, Tensor? bias, int outputs) -> Tensor")

    def computed(packed: Any, value: Any, bias: Any, outputs: int) -> Any:
        return linear(torch, packed, value, bias, outputs)

    def described(packed: Any, value: Any, bias: Any, outputs: int) -> Any:
        return value.new_empty_strided(*_layout(value.shape, outputs))

    library.impl("linear_2of4", computed, "CompositeExplicitAutograd")
    torch.library.register_fake("pst::linear_2of4", described, lib=library)
    _KEPT.append(library)
    return torch.ops.pst.linear_2of4


_KEPT: list[Any] = []
"""A library that is collected takes its operators with it."""


@functools.cache
def linear_class(torch: Any) -> Any:
    """A Linear whose weight is what cuSPARSELt packed."""
    multiply = operator(torch)

    class Linear2of4(torch.nn.Linear):  # type: ignore[misc]
        """See above; of inference alone."""

        def forward(self, value: Any) -> Any:
            return multiply(self.weight, value, self.bias, self.out_features)

    return Linear2of4
