"""Rewrites of an ONNX graph, one a file, found by name.

Each module defines ``run(model, weights) -> bool``: it rewrites the ModelProto in place and returns whether it changed
anything. *weights* are the PyTorch model's floating tensors by name. Its docstring states what it requires and what it
ensures; no pass may change what the graph computes. PASSES is the order in which an export runs them.
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pst.errors import ConfigError

PASSES = (
    "strip_metadata",
    "drop_nan_guard",
    "turn_keys",
    "plain_mask",
    "plain_shapes",
    "share_equal",
    "name_weights",
    "regroup_gelu",
    "lower_ir_version",
)
LINEAR_FORMS = {
    "auto": (),
    "matmul": ("gemm_to_matmul",),
    "gemm": ("gemm_to_matmul", "matmul_to_gemm", "plain_shapes"),
    "conv": ("gemm_to_matmul", "matmul_to_conv"),
}
"""Passes that bring linear layers into a form, by its name; auto leaves them as torch.onnx writes them.

They rewrite the layers of the weights that they are given: none but the prunable ones of transformer blocks.
"""
OPERATORS = {"matmul": "MatMul", "gemm": "Gemm", "conv": "Conv"}
"""The ONNX operator that is a linear layer in each form."""


def run_passes(
    model: Any, weights: Mapping[str, "np.ndarray[Any, Any]"], *, passes: Sequence[str] = PASSES
) -> list[str]:
    """Run *passes* on *model* (onnx.ModelProto) in place; return the names of those that changed it."""
    return [name for name in passes if importlib.import_module(f"{__name__}.{name}").run(model, weights)]


def check_linear_form(form: str) -> None:
    """Raise ConfigError for a name that is not one of LINEAR_FORMS."""
    if form not in LINEAR_FORMS:
        near = difflib.get_close_matches(form.lower(), LINEAR_FORMS, n=1)
        raise ConfigError(
            f"Unknown linear form {form!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(LINEAR_FORMS)}.")
        )
