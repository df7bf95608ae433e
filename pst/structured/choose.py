"""Which units go: those of lowest score for what they cost, until the sparsity is reached.

The score of a unit is pooled over all of its entries: its rows in every producer and its columns in the consumer,

    I_u = (sum of S over them) / cost        S as in pst/importance.py, of each weight in units of its mean |W|

so that it is a score for each multiply-add (or parameter), and units of different sizes can be compared. R of a
producer and C of the consumer add the same to a whole row or column: they say all that a unit has to learn.

One mask serves a unit. It stands in the consumer's columns, which is enough to take the unit out; the producers' rows
go when the unit is removed. Until then the straight-through gradient dL/dS := dL/dM of C sees what the unit would add,
which it could not if the rows were zero. A unit whose columns are zeros, as calibration leaves them, adds nothing
whatever was learned: it goes first.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pst.errors import ModelError
from pst.masked_weight import FusedMaskedWeight, MaskedWeight, mean_magnitude
from pst.materialize import scores_together
from pst.patterns import Pattern
from pst.patterns.structured import Structured
from pst.structured.units import Member, Units, find_units, weight_of

Budget = Literal["local", "global"]
PATTERN = "_pst_pattern"
"""Attribute of a sparsified model."""
_FIRST = -1e30
"""Below every score."""


def pattern_of(model: nn.Module) -> Structured:
    """The pattern that ``sparsify_`` gave the model."""
    pattern = getattr(model, PATTERN, None)
    assert isinstance(pattern, Structured)
    return pattern


def masked_matrix(member: Member) -> tuple[MaskedWeight, Tensor]:
    """What is attached to the member's matrix, and its original as stored."""
    attached = cast(Any, member.module).parametrizations.weight[0]
    assert isinstance(attached, MaskedWeight | FusedMaskedWeight)
    return attached.matrices(weight_of(member.module))[member.part]


@torch.no_grad()
def choose_units_(model: nn.Module, pattern: Structured, sparsity: float, *, budget: Budget | None = None) -> None:
    """Choose the masks of all units of the sparsified *model*.

    *sparsity* is the least fraction of the blocks' multiply-adds or parameters that goes. budget: "local" keeps as many
    heads, and as many neurons, in every layer; "global" lets all layers, heads and neurons compete, which takes scores
    that say what a unit adds to the outputs: None is global where the units are calibrated, else local. Every layer
    keeps one head and ``pattern.multiple`` neurons at least. Ties: of equal scores the later unit goes first.

    Raises ModelError where scores are not finite, or so much cannot go.
    """
    units = find_units(model)
    ready = scores_together(model)
    scores = [_pooled(one, ready, pattern.target) for one in units]
    for one, found in zip(units, scores, strict=True):
        if not bool(torch.isfinite(found).all()):
            raise ModelError(
                f"The scores of {one.name} hold NaN or infinity: training diverged, or the model came so. Use a lower "
                "learning rate (lr, lr_update, lr_scores), or another model."
            )
    kept = keep_units(units, scores, sparsity, pattern, budget=budget or ("global" if _calibrated(units) else "local"))
    for one, keep in zip(units, kept, strict=True):
        part, _ = masked_matrix(one.consumer)
        part.mask.copy_(keep.to(part.mask.device).repeat_interleave(one.consumer.width))
        part.sparsity.fill_(1 - int(keep.sum()) / len(keep))


def require_reachable(model: nn.Module, pattern: Pattern, sparsity: float) -> None:
    """Raise ModelError where choose_units_ could not remove as much of *model*; other patterns than structured pass."""
    if isinstance(pattern, Structured):
        units = find_units(model)
        keep_units(units, [torch.zeros(one.count) for one in units], sparsity, pattern, budget="local")


def _calibrated(units: Sequence[Units]) -> bool:
    """Whether pst/structured/calibration.py has judged the units: then Q of producers is 0."""
    Q = getattr(masked_matrix(units[0].producers[0])[0], "Q", None)
    return Q is not None and not bool(Q.any())


def kept_units(units: Sequence[Units]) -> list[Tensor]:
    """Which units the masks of the sparsified model keep, (count,) bool on the CPU for each of *units*."""
    return [masked_matrix(one.consumer)[0].mask[0, :: one.consumer.width].cpu() for one in units]


def _pooled(one: Units, ready: dict[MaskedWeight, Tensor], target: str) -> Tensor:
    """I_u (count,), float64 on the CPU."""
    total = torch.zeros(one.count, dtype=torch.float64)
    for member in (*one.producers, one.consumer):
        part, piece = masked_matrix(member)
        S = ready[part] / mean_magnitude(piece) if part in ready else part.common_scores(piece)
        by_unit = S.T if member is one.consumer else S  # (count width, the rest)
        total += by_unit.reshape(one.count, -1).sum(1).double().cpu()
    consumer, piece = masked_matrix(one.consumer)
    empty = (consumer.by_row(piece) == 0).all(0).view(one.count, -1).all(1).cpu()
    return torch.where(empty, _FIRST, total / one.cost(target))


# -- the choice, from scores alone ----------------------------------------------------------------------------------


def keep_units(
    units: Sequence[Units], scores: Sequence[Tensor], sparsity: float, pattern: Structured, *, budget: Budget
) -> list[Tensor]:
    """(count,) bool for each of *units*, True = kept, from *scores* of the same shape; see choose_units_."""
    goal = sparsity * sum(one.count * one.cost(pattern.target) for one in units)
    steps = _local(units, scores, pattern) if budget == "local" else _global(units, scores, pattern)
    kept = [torch.ones(one.count, dtype=torch.bool) for one in units]
    gone = 0
    for step in steps:
        if gone >= goal:
            break
        for at, members in step:
            kept[at][members] = False
            gone += len(members) * units[at].cost(pattern.target)
    if gone < goal:
        whole = sum(one.count * one.cost(pattern.target) for one in units)
        raise ModelError(
            f"Sparsity {sparsity:g} cannot be reached by removing {_named(pattern)}: at most {gone / whole:.3f} can "
            "go, because every layer keeps some of each. Give a lower --sparsity"
            + ("." if pattern.kinds == "both" else ", or --set structured_units=both.")
        )
    return kept


_Step = list[tuple[int, Tensor]]
"""Units that go together: the place of their kind and layer in the list, and which of them."""


def _named(pattern: Structured) -> str:
    return "heads and neurons" if pattern.kinds == "both" else pattern.kinds


def _groups(one: Units, scores: Tensor, pattern: Structured) -> list[Tensor]:
    """The units of one layer and kind in the order in which they go, but for those that stay in any case.

    Neurons go several at a time, so that after each time a multiple of them is left; the first time takes the rest.
    """
    if pattern.kinds not in ("both", one.kind):
        return []
    order = _ascending(scores)
    size = 1 if one.kind == "heads" else pattern.multiple
    first = len(order) % size or size
    return [] if len(order) <= size else [order[:first], *torch.split(order[first:-size], size)]


def _ascending(scores: Tensor) -> Tensor:
    """Indices from the lowest score to the highest; of equal ones the last comes first."""
    last_first = torch.sort(scores.flip(0), stable=True).indices
    return len(scores) - 1 - last_first


def _global(units: Sequence[Units], scores: Sequence[Tensor], pattern: Structured) -> list[_Step]:
    """One group a step, the lowest mean score first. Within a layer the mean only rises, so that its order holds."""
    every = [
        (float(found[members].double().mean()), -at, [(at, members)])
        for at, (one, found) in enumerate(zip(units, scores, strict=True))
        for members in _groups(one, found, pattern)
    ]
    return [step for _, _, step in sorted(every, key=lambda entry: entry[:2])]


def _local(units: Sequence[Units], scores: Sequence[Tensor], pattern: Structured) -> list[_Step]:
    """One group of every layer a step; heads and neurons take turns, so that like shares of both are gone."""
    groups = [_groups(one, found, pattern) for one, found in zip(units, scores, strict=True)]
    steps = []
    for kind in ("heads", "neurons"):
        rows = [(at, mine) for at, (one, mine) in enumerate(zip(units, groups, strict=True)) if one.kind == kind]
        count = max((len(mine) for _, mine in rows), default=0)
        for index in range(count):
            together = [(at, mine[index]) for at, mine in rows if index < len(mine)]
            steps.append(((index + 1) / (count + 1), together))
    return [step for _, step in sorted(steps, key=lambda entry: entry[0])]
