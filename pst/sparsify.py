"""The three verbs: attach masks, choose them, fold them away.

weights = sparsify_(model, method=PST(), pattern="2:4")
for step in range(steps):
    set_sparsity_(model, schedule(step))
    ...                                    # loss, backward, optimizer step
set_sparsity_(model, schedule.final)
merge_(model)                              # plain modules again, zeros in place

Of pattern structured the masks are those of whole heads and neurons (pst/structured), which merge_ removes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pst import kernels, patterns
from pst.budget import allocate
from pst.errors import ModelError, PatternError
from pst.masked_weight import FusedMaskedWeight, MaskedWeight
from pst.materialize import attach_hooks_, detach_hooks_, masked_weights, materialized, scores_together
from pst.methods import Method
from pst.methods.pst import PST
from pst.models import Architecture, architecture
from pst.patterns import Pattern, SharingPattern, check_sparsity, parse_pattern, sharing
from pst.patterns.structured import Structured
from pst.pending import Pending
from pst.plan import GLOBAL_PLAN, Plan, Target
from pst.structured.choose import PATTERN, Budget, choose_units_, kept_units
from pst.structured.remove import remove_units_
from pst.structured.units import find_units


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

    def matrices(self) -> tuple[Tensor, ...]:
        """The matrices that lie side by side in the weight, as stored, detached."""
        return self.weight.detach().chunk(self.parts, dim=1 - self.axis)


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
    plan: Plan | None = None,
    generator: torch.Generator | None = None,
) -> list[PrunableWeight]:
    """Attach *method*'s masked weight to every prunable weight of *model*; all masks start full, but fixed ones.

    With a *plan* each weight has a pattern and a final sparsity of its own, in place of *pattern*. Also decides which
    parameters train (requires_grad), as the method says. Raises ModelError where nothing is prunable, the model is
    sparsified already, or a method that keeps the model's zeros finds none; PatternError where the pattern does not fit
    a weight, ConfigError where the plan does not fit the model. Then the model is as it was.
    """
    method = method or PST()
    if any(True for _ in masked_weights(model)):
        raise ModelError("The model is sparsified already; call merge_ before sparsify_.")
    weights = prunable_weights(model)
    one = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    if plan is not None:
        targets = plan.assign([item.name for item in weights])
    else:
        targets = {item.name: Target(spec=one.spec, pattern=one, sparsity=1.0) for item in weights}
        if isinstance(one, Structured):
            find_units(model)  # raises for a model whose heads and neurons nobody knows
    for item in weights:
        n, k = _matrix_shape(item)
        targets[item.name].pattern.check((n, k), axis=1, name=item.name)
    masked = [
        [method.masked_weight(piece, axis=item.axis, generator=generator) for piece in item.matrices()]
        for item in weights
    ]
    for item, parts in zip(weights, masked, strict=True):
        for part in parts:
            part.pattern, part.most = targets[item.name].pattern, targets[item.name].sparsity
    _check_fixed(weights, masked)
    method.select_trainable_(model)
    for item, parts in zip(weights, masked, strict=True):
        attached = parts[0] if len(parts) == 1 else FusedMaskedWeight(parts, axis=item.axis)
        parametrize.register_parametrization(item.module, "weight", attached)
        cast(Any, item.module).parametrizations.weight.original.requires_grad_(method.trains_original)
    setattr(model, _SPARSIFIED, "mixed" if plan is not None else "alike")
    if plan is None and isinstance(one, Structured):
        setattr(model, PATTERN, one)
    attach_hooks_(model)
    return weights


_SPARSIFIED = "_pst_sparsified"
"""Attribute of a sparsified model: whether its weights follow a plan ("mixed") or one pattern ("alike")."""


def _matrix_shape(item: PrunableWeight) -> tuple[int, int]:
    stored = item.weight.shape
    outputs, inputs = stored[1 - item.axis], stored[item.axis]
    if outputs % item.parts:
        raise PatternError(f"{item.name} has {outputs} outputs, which do not hold {item.parts} matrices side by side.")
    return outputs // item.parts, inputs


def _check_fixed(weights: list[PrunableWeight], masked: list[list[MaskedWeight]]) -> None:
    """Refuse masks that never change when they are all full, or do not hold their pattern."""
    fixed = [(item, part) for item, parts in zip(weights, masked, strict=True) for part in parts if part.fixed]
    if fixed and isinstance(_pattern(fixed[0][1]), Structured):
        raise PatternError(
            "A model from which heads and neurons were removed has no zeros to keep; train it with --method dense, or "
            "with a pattern of zeros."
        )
    if fixed and all(bool(part.mask.all()) for _, part in fixed):
        raise ModelError(
            "The model has no zeros in its prunable weights, so that there is nothing to keep. "
            "Give a sparse model (what pst train wrote, for example), or choose a method that prunes, such as pst."
        )
    for item, part in fixed:
        pattern = _pattern(part)
        if not pattern.holds(part.mask.cpu().numpy(), axis=1):
            raise PatternError(
                f"The zeros of {item.name} do not follow pattern {pattern.spec}, and this method keeps them as they "
                "are; use --pattern unstructured, which every arrangement follows."
            )


@dataclass(frozen=True, kw_only=True)
class MaskCheck:
    """Whether the scores that masks were chosen from are finite, which a GPU may have yet to say."""

    model: nn.Module
    modules: Sequence[nn.Module] = ()
    """What the weights belong to."""
    flags: Pending | None = None
    """Of each of *modules*: not 0 where the scores are not finite. None: all were found finite."""

    def check(self) -> None:
        """Raise the ModelError of set_sparsity_, with the name of the weight; waits for the GPU until it is known."""
        bad = self.flags.get() if self.flags is not None else [0] * len(self.modules)
        for module, flag in zip(self.modules, bad, strict=True):
            if flag:
                raise _not_finite(self.model, module)


@overload
def set_sparsity_(
    model: nn.Module, sparsity: float, *, budget: Budget | None = None, wait: Literal[True] = True
) -> None: ...


@overload
def set_sparsity_(
    model: nn.Module, sparsity: float, *, budget: Budget | None = None, wait: Literal[False]
) -> MaskCheck: ...


@torch.no_grad()
def set_sparsity_(
    model: nn.Module, sparsity: float, *, budget: Budget | None = None, wait: bool = True
) -> MaskCheck | None:
    """Choose every mask of *model* anew from the present scores, with *sparsity* of its entries False.

    budget: "local" gives each matrix its own exact count: see the pattern. "global" gives all matrices together that
    same total, exact, and each a share of it by its scores: see pst/budget.py for the floor and ties. None is what the
    method prefers, local for a pattern that knows no other. Fixed masks stay. Under a plan *sparsity* is what no weight
    goes beyond: each stops at its own final one, and budgets are local.

    wait: False is for training on a GPU. Where masks are chosen there by pst/kernels (a local budget, any pattern but
    structured), this returns before they are; ``check()`` of what it returns says later what else is raised here, and
    until then the masks may mean nothing. Elsewhere it makes no difference.

    Raises ModelError where the model has no mask or its scores are not finite, whose masks are as they were then;
    PatternError where the sparsity is outside the pattern's range or the pattern cannot share a budget.
    """
    check = _choose_(model, sparsity, budget=budget, wait=wait)
    return None if wait else check


def _choose_(model: nn.Module, sparsity: float, *, budget: Budget | None, wait: bool) -> MaskCheck:
    check_sparsity(sparsity)
    kind: str | None = getattr(model, _SPARSIFIED, None)
    if kind is None:
        raise ModelError("The model has no masks; call sparsify_ first.")
    found = [
        (module, part, piece)
        for module, attached in masked_weights(model)
        for part, piece in attached.matrices(cast(Any, module).parametrizations.weight.original)
        if not part.fixed
    ]
    check = MaskCheck(model=model)
    if not found:
        return check
    pattern = _pattern(found[0][1])
    if isinstance(pattern, Structured):
        choose_units_(model, pattern, sparsity, budget=budget)
        return check
    if kind == "mixed" and budget == "global":
        raise PatternError(GLOBAL_PLAN)
    if budget is None:
        shares = (
            kind == "alike"
            and isinstance(pattern, SharingPattern)
            and any(part.budget == "global" for _, part, _ in found)
        )
        budget = "global" if shares else "local"
    requested = achieved = [min(sparsity, part.most) for _, part, _ in found]
    if budget == "global":
        shared, units = sharing(pattern), []
        for module, part, piece in found:
            with _naming(model, module):
                units.append(shared.units(part.common_scores(piece), axis=1).reshape(-1))
                if not bool(torch.isfinite(units[-1]).all()):
                    raise ValueError("scores hold NaN or infinity")
        sizes = [each.numel() for each in units]
        counts = allocate(units, sparsity)
        del units  # as large as all weights
        requested = [(count + 0.5) / size for count, size in zip(counts, sizes, strict=True)]
        achieved = [count / size for count, size in zip(counts, sizes, strict=True)]  # the half keeps int(size s) exact
    if kernels.usable(found[0][2].device):
        check = _choose_together_(model, found, requested, wait=wait)
    else:
        for (module, part, piece), wanted in zip(found, requested, strict=True):
            with _naming(model, module):
                part.update_mask_(piece, _pattern(part), wanted)
    _note_(found, achieved)
    return check


_Found = list[tuple[nn.Module, MaskedWeight, Tensor]]


def _pattern(part: MaskedWeight) -> Pattern:
    assert part.pattern is not None  # sparsify_ gave it one
    return part.pattern


def _choose_together_(model: nn.Module, found: _Found, sparsities: list[float], *, wait: bool) -> MaskCheck:
    """All masks at once, from all scores at once: as ``update_mask_`` of each, in a few launches on a GPU."""
    ready = scores_together(model)
    every = [ready[part] if part in ready else part.scores(piece) for _, part, piece in found]
    alike: dict[str, list[int]] = {}  # places of the weights that have a pattern
    for place, (_, part, _) in enumerate(found):
        alike.setdefault(_pattern(part).spec, []).append(place)
    masks: list[Tensor] = [torch.empty(0)] * len(found)
    modules, flags = list[nn.Module](), list[Tensor]()
    try:
        for places in alike.values():
            pattern = _pattern(found[places[0]][1])
            made, bad = patterns.masks(pattern, [every[i] for i in places], [sparsities[i] for i in places])
            for place, mask in zip(places, made, strict=True):
                masks[place] = mask
            if bad is not None:
                modules += [found[place][0] for place in places]
                flags.append(bad)
    except ValueError:
        for (module, _, _), scores in zip(found, every, strict=True):
            with _naming(model, module):
                if not bool(torch.isfinite(scores).all()):
                    raise
        raise
    check = MaskCheck(model=model, modules=modules, flags=Pending(torch.cat(flags)) if flags else None)
    if wait:
        check.check()
    torch._foreach_copy_([part.mask for _, part, _ in found], masks)
    return check


def _note_(found: _Found, sparsities: list[float]) -> None:
    """Write down the sparsity that each mask was made for."""
    buffers = [part.sparsity for _, part, _ in found]
    torch._foreach_zero_(buffers)
    torch._foreach_add_(buffers, sparsities)


@contextmanager
def _naming(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Within: scores that are not finite raise ModelError with the name of *module*."""
    try:
        yield
    except ValueError as error:
        raise _not_finite(model, module) from error


def _not_finite(model: nn.Module, module: nn.Module) -> ModelError:
    name = next(name for name, other in model.named_modules() if other is module)
    return ModelError(
        f"The scores of {name}.weight hold NaN or infinity: training diverged, or the model came so. "
        "Use a lower learning rate (lr, lr_update, lr_scores), or another model."
    )


def merge_(model: nn.Module) -> None:
    """Fold masks and updates into plain weights, in place: outputs stay equal bit for bit, pruned entries are 0.

    Units of pattern structured are removed: outputs stay equal but for rounding.
    Raises ModelError where the model has no mask.
    """
    if getattr(model, _SPARSIFIED, None) is None:
        raise ModelError("The model has no masks to merge; call sparsify_ first.")
    units: Structured | None = getattr(model, PATTERN, None)
    kept = kept_units(find_units(model)) if units is not None else []
    with torch.no_grad():
        with materialized(model):
            made = [(module, cast(Any, module).weight) for module, _ in masked_weights(model)]
        while made:
            module, weight = made.pop()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            cast(Any, module).weight.copy_(weight)
    detach_hooks_(model)
    delattr(model, _SPARSIFIED)
    if units is not None:
        delattr(model, PATTERN)
        remove_units_(model, kept, target=units.target)
