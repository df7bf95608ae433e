"""The units of a model: attention heads and feed-forward neurons, and what each of them costs.

A unit is made by rows of some weights, its producers, and read by columns of one weight, the consumer:

    heads     producers query, key, value     consumer the attention's output     rows and columns: the head's width
    neurons   producers intermediate (gate, up)     consumer the second linear     one row, one column

Where heads share keys and values (Llama), a unit is one head of keys and values with all heads of queries that read it.
Without a unit's columns nothing of it reaches the residual stream, so removing its rows as well changes no output.

Multiply-adds are those of the transformer blocks for one token of a row of LENGTH tokens: n k for each linear (n x k),
and for each head of width d the 2 d LENGTH of its two products, queries by keys and weights by values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from pst.errors import ModelError
from pst.models import Layout, architecture

LENGTH = 128
"""Tokens of a row, for the share of attention's own products."""

Kind = Literal["heads", "neurons"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """The part that a linear has in the units: some rows of one of its matrices, or some columns."""

    module: nn.Module
    part: int = 0
    """Which of the matrices side by side in the module's weight."""
    parts: int = 1
    axis: int = 1
    """Reduction axis of the weight as stored."""
    width: int
    """Rows (of a producer) or columns (of a consumer) of one unit, one after another."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """The heads, or the neurons, of one block."""

    layer: int
    kind: Kind
    count: int
    owner: nn.Module
    """The module that counts its heads; of neurons, the block."""
    producers: tuple[Member, ...]
    consumer: Member
    macs: int
    """Of one unit, for one token."""
    parameters: int
    """Of one unit: its rows with their biases, and its columns."""
    heads: int = 1
    """Heads of queries in one unit."""

    def cost(self, target: str) -> int:
        """Of one unit, in what the sparsity is a fraction of."""
        return self.macs if target == "macs" else self.parameters

    @property
    def name(self) -> str:
        """For messages."""
        return f"the {self.kind} of layer {self.layer}"


def shape_of(module: nn.Module, axis: int) -> tuple[int, int]:
    """(n, k), outputs and inputs of a linear; of a sparsified one too."""
    stored = weight_of(module).shape
    return stored[1 - axis], stored[axis]


def weight_of(module: nn.Module) -> Tensor:
    """The weight as stored, without making a masked one."""
    if hasattr(module, "parametrizations"):
        return cast(Tensor, cast(Any, module).parametrizations.weight.original)
    return cast(Tensor, module.weight)


def find_units(model: nn.Module) -> list[Units]:
    """All units of *model*, layer by layer, heads first. Raises ModelError, saying what is missing, where none is."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", "generic"))
    rules = architecture(model_type)
    if rules.layout is None:
        raise ModelError(
            f"Nothing here says where a model of type {model_type!r} has its heads and neurons, so pattern structured "
            "cannot remove any; choose another pattern, or give pst/models/<model_type>.py a layout (CONTRIBUTING.md)."
        )
    layout, found = rules.layout, []
    blocks = [module for name, module in model.named_modules() if layout.block.search(name)]
    if not blocks:
        raise ModelError(f"The {type(model).__name__} has no transformer block by the name that its layout gives.")
    for index, block in enumerate(blocks):
        if layout.crossed and any(name.endswith(layout.crossed) for name, _ in block.named_modules()):
            raise ModelError(
                f"Layer {index} of the {type(model).__name__} has cross-attention, whose heads pattern structured does "
                "not know; choose another pattern."
            )
        found += [_heads(model, block, index, layout, rules.axis), _neurons(block, index, layout, rules.axis)]
    return found


def _heads(model: nn.Module, block: nn.Module, layer: int, layout: Layout, axis: int) -> Units:
    consumer = block.get_submodule(layout.attention_output)
    owner = block.get_submodule(layout.attention)
    width = _head_width(owner)
    columns = shape_of(consumer, axis)[1]
    members, parts = [], layout.fused
    for name in layout.attention_inputs:
        module = block.get_submodule(name)
        members += [(module, part, shape_of(module, axis)[0] // parts) for part in range(parts)]
    count = min(rows for _, _, rows in members) // width  # of keys and values, where they are fewer
    producers = tuple(
        Member(module=module, part=part, parts=parts, axis=axis, width=rows // count) for module, part, rows in members
    )
    heads = columns // width // count
    return _units(
        layer, "heads", count, owner, producers, Member(module=consumer, axis=axis, width=columns // count),
        axis=axis, own=2 * width * heads * LENGTH, heads=heads,
    )  # fmt: skip


def _head_width(owner: nn.Module) -> int:
    for name in ("attention_head_size", "head_dim"):
        if hasattr(owner, name):
            return int(getattr(owner, name))
    raise ModelError(f"{type(owner).__name__} does not state the width of its heads, so they cannot be told apart.")


def _neurons(block: nn.Module, layer: int, layout: Layout, axis: int) -> Units:
    consumer = block.get_submodule(layout.feed_forward_output)
    producers = tuple(
        Member(module=block.get_submodule(name), axis=axis, width=1) for name in layout.feed_forward_inputs
    )
    count = shape_of(consumer, axis)[1]
    return _units(layer, "neurons", count, block, producers, Member(module=consumer, axis=axis, width=1), axis=axis)


def _units(
    layer: int, kind: Kind, count: int, owner: nn.Module, producers: Sequence[Member], consumer: Member,
    *, axis: int, own: int = 0, heads: int = 1,
) -> Units:  # fmt: skip
    weights = sum(one.width * shape_of(one.module, axis)[1] for one in producers)
    weights += consumer.width * shape_of(consumer.module, axis)[0]
    biases = sum(one.width for one in producers if getattr(one.module, "bias", None) is not None)
    return Units(
        layer=layer, kind=kind, count=count, owner=owner, producers=tuple(producers), consumer=consumer,
        macs=weights + own, parameters=weights + biases, heads=heads,
    )  # fmt: skip
