"""The three verbs: attach masks, choose them, fold them away.

weights = sparsify_(model, method=PST(), pattern="2:4")
for step in range(steps):
    set_sparsity_(model, schedule(step))
    ...                                    # loss, backward, optimizer step
set_sparsity_(model, schedule.final)
merge_(model)                              # plain modules again, zeros in place
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pst.errors import ModelError, PatternError
from pst.masked_weight import FusedMaskedWeight, MaskedWeight
from pst.methods import Method
from pst.methods.pst import PST
from pst.models import Architecture, architecture
from pst.patterns import Pattern, check_sparsity, parse_pattern


@dataclass(frozen=True, kw_only=True)
class PrunableWeight:
    """One weight that may become sparse."""

    name: str
    """As in the state dict of the plain model."""
    module: nn.Module
    axis: int
    """The reduction (input) axis of the stored tensor."""
    parts: int = 1
    """Matrices side by side along the output axis, each masked by itself."""

    @property
    def weight(self) -> Tensor:
        """The weight that the module multiplies by, as stored."""
        return cast(Tensor, self.module.weight)


def prunable_weights(model: nn.Module, *, rules: Architecture | None = None) -> list[PrunableWeight]:
    """Every prunable weight of *model*, by the rules of its architecture. Raises ModelError where there is none."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", "generic"))
    rules = rules or architecture(model_type)
    found = []
    for name, module in model.named_modules():
        axis = _reduction_axis(module)
        if axis is not None and rules.prunable.search(name):
            found.append(PrunableWeight(name=f"{name}.weight", module=module, axis=axis, parts=rules.parts(name)))
    if not found:
        raise ModelError(
            f"The model (type {model_type!r}, class {type(model).__name__}) has no prunable weight: no linear layer "
            "inside a transformer block. Choose another model, or add pst/models/<model_type>.py (CONTRIBUTING.md)."
        )
    return found


def _reduction_axis(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return 1
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor):
        return 0  # transformers' GPT-2 linear, stored inputs x outputs
    return None


def sparsify_(
    model: nn.Module,
    *,
    method: Method | None = None,
    pattern: str | Pattern = "unstructured",
    generator: torch.Generator | None = None,
) -> list[PrunableWeight]:
    """Attach *method*'s masked weight to every prunable weight of *model*; all masks start full.

    Also decides which parameters train (requires_grad), as the method says. Raises ModelError where nothing is
    prunable or the model is sparsified already, PatternError where the pattern does not fit a weight.
    """
    method = method or PST()
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    if any(True for _ in masked_weights(model)):
        raise ModelError("The model is sparsified already; call merge_ before sparsify_.")
    weights = prunable_weights(model)
    for item in weights:
        n, k = _matrix_shape(item)
        pattern.check((n, k), axis=1, name=item.name)
    method.select_trainable_(model)
    for item in weights:
        original = item.weight.detach()
        pieces = original.chunk(item.parts, dim=1 - item.axis)
        masked = [method.masked_weight(piece, axis=item.axis, generator=generator) for piece in pieces]
        attached = masked[0] if len(masked) == 1 else FusedMaskedWeight(masked, axis=item.axis)
        parametrize.register_parametrization(item.module, "weight", attached)
        cast(Any, item.module).parametrizations.weight.original.requires_grad_(method.trains_original)
    setattr(model, _PATTERN, pattern)
    return weights


_PATTERN = "_pst_pattern"


def _matrix_shape(item: PrunableWeight) -> tuple[int, int]:
    stored = item.weight.shape
    outputs, inputs = stored[1 - item.axis], stored[item.axis]
    if outputs % item.parts:
        raise PatternError(f"{item.name} has {outputs} outputs, which do not hold {item.parts} matrices side by side.")
    return outputs // item.parts, inputs


def masked_weights(model: nn.Module) -> Iterator[tuple[nn.Module, MaskedWeight | FusedMaskedWeight]]:
    """Every sparsified module of *model*, with what was attached to its weight."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            attached = cast(Any, module).parametrizations.weight[0]
            if isinstance(attached, MaskedWeight | FusedMaskedWeight):
                yield module, attached


def set_sparsity_(model: nn.Module, sparsity: float) -> None:
    """Choose every mask of *model* anew from the present scores, with *sparsity* of its entries False.

    The count is exact in each matrix: see the pattern. Raises ModelError where the model has no mask or its scores are
    not finite, PatternError where the sparsity is outside the pattern's range.
    """
    check_sparsity(sparsity)
    pattern: Pattern | None = getattr(model, _PATTERN, None)
    if pattern is None:
        raise ModelError("The model has no masks; call sparsify_ first.")
    for module, attached in masked_weights(model):
        try:
            attached.update_mask_(cast(Any, module).parametrizations.weight.original, pattern, sparsity)
        except ValueError as error:
            name = next(name for name, other in model.named_modules() if other is module)
            raise ModelError(
                f"The scores of {name}.weight hold NaN or infinity: training diverged, or the model came so. "
                "Use a lower learning rate (lr, lr_update, lr_scores), or another model."
            ) from error


def merge_(model: nn.Module) -> None:
    """Fold masks and updates into plain weights, in place: outputs stay equal bit for bit, pruned entries are 0.

    Raises ModelError where the model has no mask.
    """
    if getattr(model, _PATTERN, None) is None:
        raise ModelError("The model has no masks to merge; call sparsify_ first.")
    with torch.no_grad():
        for module, _ in list(masked_weights(model)):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    delattr(model, _PATTERN)
