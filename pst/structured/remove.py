"""Taking units out of the weights, and making a plain model as small as one from which they were taken.

What stays in a model that went through here: the linears are smaller, the modules that count heads count fewer, and
config.structured says what is left of each layer. Residual widths stay as they are.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pst.errors import ModelError
from pst.models import architecture
from pst.structured.report import FIELD, SCHEMA_VERSION
from pst.structured.units import LENGTH, Member, Units, find_units

_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size", "split_size")
"""Attributes of attention modules, where they have them: heads of queries, and these times their width."""


@torch.no_grad()
def remove_units_(model: nn.Module, kept: Sequence[Tensor], *, target: str = "macs") -> None:
    """Keep of each of ``find_units(model)`` those that *kept* says, (count,) bool, and write config.structured.

    *model* is plain; the outputs are as with zeros in the columns of what goes, but for rounding.
    """
    units = find_units(model)
    before = getattr(cast(Any, model).config, FIELD, None)
    report = describe_removal(units, kept, before=before, target=target)
    for one, keep in zip(units, kept, strict=True):
        _resize_(one, keep.nonzero().flatten())
    setattr(cast(Any, model).config, FIELD, report)
    _express_(model, report)


def shape_model_(model: nn.Module, report: dict[str, Any], *, where: str) -> None:
    """Give the plain *model* the sizes that *report*, a config.structured, states. Values have no meaning afterwards.

    Raises ModelError, naming *where*, where they do not go together.
    """
    layers, units = report["layers"], find_units(model)
    if len(units) != 2 * len(layers):
        raise ModelError(
            f"{where} has {len(units) // 2} layers, but its config.json states what is left of {len(layers)}."
        )
    for one in units:
        left = layers[one.layer][one.kind]
        wanted = list(range(left)) if one.kind == "neurons" else left
        if not wanted or len(wanted) > one.count or max(wanted) >= max(one.count, report["dense"][one.kind]):
            raise ModelError(
                f"{where} states {left} as what is left of {one.name}, which has {one.count}; get it again."
            )
        if len(wanted) < one.count:
            index = torch.tensor(wanted, device="cpu")  # whatever device the model is being made on
            _resize_(one, index)


def describe_removal(
    units: Sequence[Units], kept: Sequence[Tensor], *, before: dict[str, Any] | None = None, target: str = "macs"
) -> dict[str, Any]:
    """What is left, as config.structured has it; *before* is that of a model which had lost units already."""
    layers: list[dict[str, Any]] = [{} for _ in range(1 + max(one.layer for one in units))]
    for one, keep in zip(units, kept, strict=True):
        left = keep.nonzero().flatten().tolist()
        if one.kind == "heads" and before is not None:
            left = [before["layers"][one.layer]["heads"][index] for index in left]
        layers[one.layer][one.kind] = left if one.kind == "heads" else len(left)
    counts = {one.kind: one.count for one in units}
    report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "target": target, "length": LENGTH, "layers": layers}
    report["dense"] = before["dense"] if before is not None else counts
    for name in ("macs", "parameters"):
        costs = [one.cost(name) for one in units]
        whole = sum(cost * one.count for cost, one in zip(costs, units, strict=True))
        rest = sum(cost * int(keep.sum()) for cost, keep in zip(costs, kept, strict=True))
        report[name] = {"dense": before[name]["dense"] if before is not None else whole, "kept": rest}
    return report


def _resize_(one: Units, keep: Tensor) -> None:
    """Leave the units *keep* (indices) in every weight that they are in, and in what counts them."""
    for member in one.producers:
        if member.part == 0:
            _keep_rows_(
                member, [_entries(keep, other.width) for other in one.producers if other.module is member.module]
            )
    _keep_columns_(one.consumer, _entries(keep, one.consumer.width))
    if one.kind == "heads":
        heads = len(keep) * one.heads
        for name in _COUNTS:
            if hasattr(one.owner, name):
                setattr(one.owner, name, heads)
        for name in _WIDTHS:
            if hasattr(one.owner, name):
                setattr(one.owner, name, heads * (one.consumer.width // one.heads))
        _select_position_bias_(one.owner, keep.cpu())


def _entries(keep: Tensor, width: int) -> Tensor:
    """The rows or columns of the units *keep*."""
    return (keep.unsqueeze(1) * width + torch.arange(width, device=keep.device)).flatten()


def _keep_rows_(member: Member, rows: list[Tensor]) -> None:
    """Leave *rows* of each matrix side by side in the member's module."""
    module, outputs = cast(Any, member.module), 1 - member.axis
    size = module.weight.shape[outputs] // member.parts
    index = torch.cat([mine + size * part for part, mine in enumerate(rows)])
    _set_(module, "weight", module.weight.index_select(outputs, index.to(module.weight.device)))
    if module.bias is not None:
        _set_(module, "bias", module.bias.index_select(0, index.to(module.bias.device)))
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "nf", len(index))


def _keep_columns_(member: Member, columns: Tensor) -> None:
    module = cast(Any, member.module)
    _set_(module, "weight", module.weight.index_select(member.axis, columns.to(module.weight.device)))
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "nx", len(columns))


def _set_(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))


def _select_position_bias_(owner: nn.Module, keep: Tensor) -> None:
    """Let attention that is given a bias of positions for every head (MPNet's) take that of its own heads."""
    names = list(inspect.signature(owner.forward).parameters)
    if "position_bias" not in names:
        return
    at = names.index("position_bias")

    def select(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > at and args[at] is not None:
            args = (*args[:at], args[at].index_select(1, keep.to(args[at].device)), *args[at + 1 :])
        elif kwargs.get("position_bias") is not None:
            bias = kwargs["position_bias"]
            kwargs = {**kwargs, "position_bias": bias.index_select(1, keep.to(bias.device))}
        return args, kwargs

    owner.register_forward_pre_hook(select, with_kwargs=True)


def _express_(model: nn.Module, report: dict[str, Any]) -> None:
    """Say what is left in the architecture's own fields, where all layers are alike and it has such fields."""
    config: Any = cast(Any, model).config
    layout = architecture(config.model_type).layout
    assert layout is not None
    neurons = {layer["neurons"] for layer in report["layers"]}
    heads = {len(layer["heads"]) for layer in report["layers"]}
    if len(neurons) != 1 or len(heads) != 1 or (heads != {report["dense"]["heads"]} and layout.heads_fields is None):
        return
    setattr(config, layout.neurons_field, neurons.pop())
    if layout.heads_fields is not None:
        queries, keys = layout.heads_fields
        ratio = getattr(config, queries) // getattr(config, keys)
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, queries)
        left = heads.pop()
        setattr(config, queries, left * ratio)
        setattr(config, keys, left)
