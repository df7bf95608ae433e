"""Store equal weights once.

A model that uses one weight in several places (ALBERT's layers all share theirs) comes out of the exporter with one
transposed copy for each use.

Requires: initializers inside the model file (no external data).
Ensures: no two initializers of the main graph above MINIMUM bytes have the same type, shape and bytes; the first in
graph order stays and everything that read another reads it. The graph computes the same.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from export.passes.name_weights import rename

MINIMUM = 1024
"""Bytes below which a copy costs less than it is worth."""


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Remove copies from *model* in place."""
    first: dict[tuple[Any, ...], str] = {}
    copies: dict[str, str] = {}
    outputs = {value.name for value in model.graph.output}
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > MINIMUM and tensor.name not in outputs:
            key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest())
            if key in first:
                copies[tensor.name] = first[key]
            else:
                first[key] = tensor.name
    for position in reversed(range(len(model.graph.initializer))):
        if model.graph.initializer[position].name in copies:
            del model.graph.initializer[position]
    rename(model.graph, copies)
    return bool(copies)
