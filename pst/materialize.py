"""When masked weights are made: once for each forward pass of a model in training, once for all in evaluation.

On a GPU all masked weights of PST come from one launch (pst/kernels), as outputs of one autograd function, so that its
backward pass turns the gradients of all of them into those of U, V, A, B, R, C at once. What the kernels do not serve,
other methods and other devices, is made by each weight for itself.

sparsify_ puts hooks on the model that do this for whoever calls it. They are of no use to a part of the model that is
called by itself, whose weights then make themselves.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from pst import kernels
from pst.graphs import MOST
from pst.kernels.matrices import Matrices, kind, serves, together
from pst.masked_weight import FusedMaskedWeight, MaskedLowRank, MaskedWeight
from pst.pending import moved
from pst.recompute import recomputed_activations

Attached = MaskedWeight | FusedMaskedWeight


def masked_weights(model: nn.Module) -> Iterator[tuple[nn.Module, Attached]]:
    """Every sparsified module of *model*, with what was attached to its weight."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            attached = cast(Any, module).parametrizations.weight[0]
            if isinstance(attached, MaskedWeight | FusedMaskedWeight):
                yield module, attached


class Together:
    """Modules whose masked weights one launch makes."""

    def __init__(self, members: Sequence[tuple[Attached, Tensor]]) -> None:
        """*members*: what is attached, and the module's original weight."""
        self.attached = [attached for attached, _ in members]
        self.originals = [original for _, original in members]
        pairs = [pair for attached, original in members for pair in attached.matrices(original)]
        self.matrices: Matrices = together([(cast(MaskedLowRank, part), piece) for part, piece in pairs])
        self.parts = [len(attached.matrices(original)) for attached, original in members]
        starts = list(itertools.accumulate((-(-original.numel() // 8) * 8 for original in self.originals), initial=0))
        self.starts = starts
        """Where each masked weight begins in one tensor for all, and how long that is; multiples of 16 bytes."""
        inside = [
            start + piece.storage_offset() - original.storage_offset()
            for start, original, parts in zip(starts, self.originals, self.parts, strict=False)
            for piece in original.chunk(parts, dim=1 - self.matrices.axis)
        ]
        self.inside = torch.tensor(inside, dtype=torch.int64).to(self.matrices.device)
        on_gpu = self.matrices.device.type == "cuda"
        self._rows = iter(torch.empty(MOST, len(pairs), dtype=torch.int64, pin_memory=on_gpu))

    def is_current(self) -> bool:
        """Whether every tensor lies where the table says."""
        return self.matrices.addresses == self.matrices.present_addresses()

    def pieces(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the modules' shapes, as those of the matrices."""
        axis = self.matrices.axis
        return [
            piece
            for weight, parts in zip(weights, self.parts, strict=True)
            for piece in weight.chunk(parts, dim=1 - axis)
        ]

    def empty(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
        """A tensor for each masked weight, and where its matrices lie, (matrices,) int64."""
        flat = torch.empty(self.starts[-1], dtype=dtype, device=self.matrices.device)
        weights = tuple(
            flat[start : start + original.numel()].view(original.shape)
            for start, original in zip(self.starts, self.originals, strict=False)
        )
        return weights, self.inside * flat.element_size() + flat.data_ptr()

    def addresses_of(self, pieces: Sequence[Tensor]) -> Tensor:
        """Where *pieces* lie, (pieces,) int64 on their device."""
        found = torch.tensor([piece.data_ptr() for piece in pieces], dtype=torch.int64)
        if self.matrices.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            kept: Tensor = next(self._rows).copy_(found)  # pinned: a graph reads it again at every replay
            return kept.to(self.matrices.device, non_blocking=True)
        return moved(found, self.matrices.device)

    def versions(self) -> int:
        """Changes with every change in place of what the masked weights are made of."""
        masks = [part.mask for part in self.matrices.parts]
        return sum(tensor._version for tensor in (*self.matrices.trained, *self.matrices.stored, *masks))


class MaskedWeights(torch.autograd.Function):
    """M * (W0 + beta U V) of many modules, with the gradients of pst/importance.py."""

    @staticmethod
    def forward(ctx: Any, group: Together, dtype: torch.dtype, *trained: Tensor) -> tuple[Tensor, ...]:
        """The masked weights as the modules store them, in *dtype*; *trained* are those of group.matrices."""
        from pst.kernels import low_rank

        ctx.set_materialize_grads(False)
        ctx.group, ctx.dtype, ctx.versions = group, dtype, group.versions()
        weights, addresses = group.empty(dtype)
        low_rank.masked_weights(group.matrices, group.pieces(weights), addresses=addresses)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of *trained*; a weight that was not used counts as zeros."""
        from pst.kernels import low_rank

        group: Together = ctx.group
        if group.versions() != ctx.versions:
            raise RuntimeError("a mask, or a tensor that a masked weight is made of, changed before the backward pass")
        found = []
        for grad, original in zip(grads, group.originals, strict=True):
            if grad is None:
                found.append(torch.zeros_like(original, dtype=ctx.dtype))
            elif grad.stride() == original.stride():
                found.append(grad)
            else:
                found.append(torch.empty_like(original, dtype=ctx.dtype).copy_(grad))
        exact = ctx.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        pieces, precision = group.pieces(found), "ieee" if exact else "tf32"
        addresses = group.addresses_of(pieces)
        return None, None, *low_rank.gradients(group.matrices, pieces, addresses=addresses, precision=precision)


_groups: "weakref.WeakKeyDictionary[nn.Module, list[Together]]" = weakref.WeakKeyDictionary()
_held: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose weights stay made until ``materialized`` ends."""


def groups_of(model: nn.Module) -> list[Together]:
    """The modules of *model* that the kernels serve, in groups; none where they cannot be used."""
    if not kernels.usable(next(model.parameters()).device):
        return []  # not remembered: the model may move
    found = _groups.get(model)
    if found is None or not all(group.is_current() for group in found):
        members: dict[tuple[object, ...], list[tuple[Attached, Tensor]]] = {}
        for module, attached in masked_weights(model):
            original = cast(Any, module).parametrizations.weight.original
            pairs = attached.matrices(original)
            if (
                kernels.usable(original.device)
                and all(serves(part, piece) for part, piece in pairs)
                and original.is_contiguous()
            ):
                key = kind(cast(MaskedLowRank, pairs[0][0]), pairs[0][1])
                members.setdefault(key, []).append((attached, original))
        found = [Together(each) for each in members.values()]
        _groups[model] = found
    return found


def attach_hooks_(model: nn.Module) -> None:
    """Let each forward pass of *model* make its masked weights at its start."""
    hooks = model.register_forward_pre_hook(_before), model.register_forward_hook(_after, always_call=True)
    setattr(model, _HOOKS, hooks)


def detach_hooks_(model: nn.Module) -> None:
    """Undo ``attach_hooks_``."""
    for hook in getattr(model, _HOOKS):
        hook.remove()
    delattr(model, _HOOKS)
    _groups.pop(model, None)  # which holds the tensors of every weight


_HOOKS = "_pst_hooks"
_open: "weakref.WeakKeyDictionary[nn.Module, ExitStack]" = weakref.WeakKeyDictionary()


def _before(model: nn.Module, inputs: Any) -> None:
    if model in _held or (model.training and _checkpoints_activations(model)):
        return
    groups = groups_of(model)
    _make(groups)
    if groups and model.training and torch.is_grad_enabled():
        _open[model] = ExitStack()
        _open[model].enter_context(recomputed_activations())


def _checkpoints_activations(model: nn.Module) -> bool:
    """Whether blocks run again in the backward pass, and so have to make their weights again, by themselves."""
    return any(module.__dict__.get("gradient_checkpointing", False) for module in model.modules())


def _after(model: nn.Module, inputs: Any, output: Any) -> None:
    if model in _held:
        return
    _forget(groups_of(model))
    if model in _open:
        _open.pop(model).close()


def _make(groups: Sequence[Together]) -> None:
    for group in groups:
        device = group.matrices.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        weights = MaskedWeights.apply(group, dtype, *group.matrices.trained)  # type: ignore[no-untyped-call]
        for attached, weight in zip(group.attached, weights, strict=True):
            attached.made = weight


def _forget(groups: Sequence[Together]) -> None:
    for group in groups:
        for attached in group.attached:
            attached.made = None


@torch.no_grad()
def scores_together(model: nn.Module) -> dict[MaskedWeight, Tensor]:
    """S (n, k) of every matrix of *model* that the kernels serve, from one launch a group."""
    found: dict[MaskedWeight, Tensor] = {}
    for group in groups_of(model):
        from pst.kernels import low_rank

        matrices = group.matrices
        pieces = torch.split(low_rank.scores(matrices), [n * k for n, k in matrices.shapes])
        found |= {part: S.view(shape) for part, S, shape in zip(matrices.parts, pieces, matrices.shapes, strict=True)}
    return found


@contextmanager
def materialized(model: nn.Module) -> Iterator[None]:
    """Within: every masked weight of *model* is made once, without gradient, however often the model is called."""
    if model in _held:
        yield
        return
    _held.add(model)
    groups = groups_of(model)
    try:
        with parametrize.cached():
            with torch.no_grad():
                _make(groups)
                for module, _ in masked_weights(model):
                    _ = module.weight  # which torch keeps until the end
            yield
    finally:
        _forget(groups)
        _held.discard(model)
