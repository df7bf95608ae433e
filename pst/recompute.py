"""Activations that are cheaper to make again than to keep: memory for a few passes over it.

The backward pass of a linear layer needs its input. Where that input is GELU of something, autograd keeps both the
something, for GELU, and GELU of it, for the linear: in a BERT layer two of the largest tensors. Within
``recomputed_activations`` the second is not kept; it is computed again, to the bit, when the backward pass gets there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 2**16
"""Entries of a tensor from which on it is worth the trouble."""
_SHAPES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}


def recomputed_activations() -> Any:
    """Context of a forward pass whose backward pass makes outputs of GELU again instead of keeping them."""
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


class _Again:
    """How to get a tensor back."""

    def __init__(self, node: Any, shape: torch.Size) -> None:
        self.node, self.shape = node, shape

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return F.gelu(self.node._saved_self, approximate=self.node._saved_approximate).reshape(self.shape)


def _pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
    node: Any = tensor.grad_fn
    kept = (
        tensor.detach()
    )  # a node that kept its own output would keep itself, and all before it, where no backward comes
    if node is None or tensor.numel() < SMALLEST:
        return kept
    while node is not None and node.name() in _SHAPES:
        node = node.next_functions[0][0]
    if node is None or node.name() != "GeluBackward0" or tensor._version or not tensor.is_contiguous():
        return kept
    return _Again(node, tensor.shape)


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
