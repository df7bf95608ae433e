"""The folder a run leaves: what save_pretrained writes, and sparsity.json, which says how it was made."""

import contextlib
import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from pst import __version__
from pst.config import TrainConfig
from pst.files import atomic_folder, write_json
from pst.plan import read_plan
from pst.quiet import quiet_transformers
from pst.revision import git_revision
from pst.sparsify import prunable_weights
from pst.structured.report import FIELD, removed_share
from pst.tasks import Prepared

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "transformers", "datasets", "numpy")


def save_model(
    model: nn.Module,
    prepared: Prepared,
    folder: Path,
    *,
    config: TrainConfig,
    shape: TrainConfig,
    report: dict[str, Any],
) -> None:
    """Write the merged *model*, its tokenizer and sparsity.json to *folder*, whole or not at all.

    *shape* is *config* with the pattern and sparsity that the model came to have, where they were not the user's
    choice. *report* is what the run says of itself: metrics, seconds, steps.
    """
    content = {
        **sparsity_of(
            model, method=config.method, pattern=shape.pattern, requested=shape.sparsity or 0.0, plan=config.plan
        ),
        "task": prepared.task,
        "max_length": prepared.max_length,
        "base_model": config.model,
        "data": prepared.data,
        "config": asdict(config),
        "seed": config.seed,
        **report,
        "versions": versions(),
        "git_revision": git_revision(),
    }
    tokenizer = prepared.tokenizer
    tokenizer.model_max_length = prepared.max_length
    tokenizer.backend_tokenizer.no_truncation()  # otherwise the last call's settings end up in tokenizer.json
    tokenizer.backend_tokenizer.no_padding()
    with quiet_transformers(), atomic_folder(folder, overwrite=True) as partial:
        cast(Any, model).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / "sparsity.json", content)


def sparsity_of(model: nn.Module, *, method: str, pattern: str, requested: float, plan: str = "") -> dict[str, Any]:
    """What sparsity.json says of the zeros of the merged *model*; of pattern structured, of what was removed.

    plan: the text of the plan that it followed.
    """
    prunable = prunable_weights(model) if method != "dense" else []
    targets = read_plan(plan).assign([item.name for item in prunable]) if plan else {}
    weights = [
        {
            "name": item.name,
            "shape": list(item.weight.shape),
            "axis": item.axis,
            "pattern": targets[item.name].spec if targets else pattern,
            "density": int(torch.count_nonzero(item.weight)) / item.weight.numel(),
        }
        for item in prunable
    ]
    measured, removal = measured_sparsity(weights), {}
    if pattern == "structured":
        removal = {FIELD: getattr(cast(Any, model).config, FIELD)}
        measured = removed_share(removal[FIELD])
    if targets:
        sizes = {item.name: item.weight.numel() for item in prunable}
        requested = sum(size * targets[name].sparsity for name, size in sizes.items()) / sum(sizes.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "pattern": pattern,
        "sparsity": {"requested": requested, "measured": measured},
        **removal,
        "weights": weights,
    }


def measured_sparsity(weights: list[dict[str, Any]]) -> float:
    """Zeros over all entries of the listed weights; 0 for an empty list."""
    sizes = [float(row["shape"][0] * row["shape"][1]) for row in weights]
    zeros = [size * (1 - row["density"]) for size, row in zip(sizes, weights, strict=True)]
    return sum(zeros) / sum(sizes) if sizes else 0.0


def versions() -> dict[str, str]:
    """Of this package, Python, and the libraries a result depends on."""
    found = {"sparse-pst": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
