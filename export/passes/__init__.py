"""Rewrites of an ONNX graph, one a file, found by name.

Each module defines ``run(model, weights) -> bool``: it rewrites the ModelProto in place and returns whether it changed
anything. *weights* are the PyTorch model's floating tensors by name. Its docstring states what it requires and what it
ensures; no pass may change what the graph computes. PASSES is the order in which an export runs them.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

PASSES = ("strip_metadata", "share_equal", "name_weights", "regroup_gelu", "lower_ir_version")


def run_passes(model: Any, weights: Mapping[str, "np.ndarray[Any, Any]"]) -> list[str]:
    """Run PASSES on *model* (onnx.ModelProto) in place; return the names of those that changed it."""
    return [name for name in PASSES if importlib.import_module(f"{__name__}.{name}").run(model, weights)]
