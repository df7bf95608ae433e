"""What is made again is what would have been kept, to the bit, and less is kept."""

import contextlib
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst import recompute
from pst.recompute import recomputed_activations


class Layer(nn.Module):
    def __init__(self, *, approximate: str) -> None:
        super().__init__()
        self.up, self.down, self.approximate = nn.Linear(16, 64), nn.Linear(64, 16), approximate

    def forward(self, X: Tensor) -> Tensor:
        found: Tensor = self.down(F.gelu(self.up(X), approximate=self.approximate))
        return found


def gradients(layer: Layer, X: Tensor, context: Any) -> list[Tensor]:
    layer.zero_grad()
    with context:
        Y = layer(X)
    Y.square().sum().backward()
    return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(64, 32, 16), (4096, 16)])
def test_gradients_are_equal_to_the_bit(
    approximate: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    again = recompute._Again.__call__

    def count(self: Any) -> Tensor:
        made.append(self.shape)
        return again(self)

    monkeypatch.setattr(recompute._Again, "__call__", count)
    torch.manual_seed(0)
    layer, X = Layer(approximate=approximate), torch.randn(*shape)
    expected = gradients(layer, X, contextlib.nullcontext())
    assert made == []
    found = gradients(layer, X, recomputed_activations())
    assert len(made) == 1
    assert len(found) == 4
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def kept_bytes(layer: Layer, X: Tensor, wrap: bool) -> int:
    """Of tensors that the backward pass holds on to, each storage once."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept = recompute._pack(tensor) if wrap else tensor
        if isinstance(kept, Tensor):
            held[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        layer(X)
    return sum(held.values())


def test_the_output_of_gelu_is_not_kept() -> None:
    layer, X = Layer(approximate="none"), torch.randn(4096, 16)
    assert kept_bytes(layer, X, False) - kept_bytes(layer, X, True) == 4096 * 64 * 4


def test_small_tensors_and_other_activations_are_kept() -> None:
    small = F.gelu(torch.randn(8, requires_grad=True))
    other = torch.relu(torch.randn(2**16, requires_grad=True))
    cut = F.gelu(torch.randn(2**17, requires_grad=True))[: 2**16]
    for tensor in (small, other, cut):
        kept = recompute._pack(tensor)
        assert isinstance(kept, Tensor)
        assert kept.data_ptr() == tensor.data_ptr()
        assert kept.shape == tensor.shape


def test_what_no_backward_pass_uses_is_freed() -> None:
    """As a model's own loss beside the one that is trained on: exp keeps its output."""

    class Token:
        pass

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, X: Tensor, token: Token) -> Tensor:
            ctx.token = token
            return X.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return grads[0], None

    token = Token()
    watched = weakref.ref(token)
    with recomputed_activations():
        Y = Watched.apply(torch.randn(8, requires_grad=True), token).exp()  # type: ignore[no-untyped-call]
    del token
    assert watched() is not None
    del Y
    assert watched() is None
