"""What methods share: which of a model's own tensors train beside a frozen weight, and optimizer groups by name."""

from collections.abc import Iterable
from typing import Any

from torch import nn

_ATTACHED = ".parametrizations.weight."


def train_head_and_vectors_(model: nn.Module) -> None:
    """Of the plain *model*, train the vectors (LayerNorm, biases) and the task head; freeze every other matrix."""
    head = _head_prefixes(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.ndim == 1 or name.startswith(head))


def groups_by_name(model: nn.Module, *rates: tuple[Iterable[str], float], rest: float) -> list[dict[str, Any]]:
    """Optimizer groups of the sparsified *model*, one for each of *rates* that has a parameter, then the rest.

    *rates*: names of tensors that a method attached to a weight, and their learning rate.
    """
    wanted = [(frozenset(names), lr) for names, lr in rates]
    found: list[list[nn.Parameter]] = [[] for _ in range(len(wanted) + 1)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            leaf = name.rsplit(".", 1)[-1] if _ATTACHED in name else ""
            found[next((i for i, (names, _) in enumerate(wanted) if leaf in names), -1)].append(parameter)
    every = [*(lr for _, lr in wanted), rest]
    return [{"params": params, "lr": lr} for params, lr in zip(found, every, strict=True) if params]


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of what a Hugging Face model puts on top of its base: classifier, score, and BERT's pooler before it.

    In a model that is not of that kind every child counts: what is not pruned there trains.
    """
    base = str(getattr(model, "base_model_prefix", ""))
    if base and base not in dict(model.named_children()):  # a base by itself, whose embeddings are no head
        return ("pooler.",)
    tops = tuple(f"{name}." for name, _ in model.named_children() if name != base)
    return (*tops, f"{base}.pooler.")
