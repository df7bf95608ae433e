"""Take the guard against rows that see nothing out of attention: a mask that is finite needs none.

    masked = Add(scores, Where(mask, 0, lowest));  s = Softmax(masked);  Where(IsNaN(s), 0, s)
    masked = Add(scores, Where(mask, 0, MASKED));  s = Softmax(masked);  s

Of a row of nothing but -inf the softmax is NaN, and the exporter writes a guard for it, though it masks with the lowest
number of float32 (which with a score added may be -inf in fp16). Runtimes know attention by its shape, and the guard
hides it: TensorRT-RTX 1.7 fails on it in half types.

Requires: scores far smaller than MASKED in size, so that what is masked still weighs exactly nothing.
Ensures: no IsNaN behind a softmax whose mask is such a Where and is used in such sums alone. A row that sees a token
computes the same; one that sees none, which is padding, comes out as if nothing were masked, and finite, in fp16 too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from export.passes._layout import drop_unread
from export.passes.name_weights import rename

MASKED = -3e4
"""In place of -inf: with any score of that size added it is still a finite number of fp16, which ends at 65,504."""
_NAME = "masked_score"


def run(model: Any, weights: Mapping[str, Any]) -> bool:
    """Rewrite *model* in place."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    guards: dict[str, str] = {}  # what a guard gives, and the softmax that it guards
    masks: dict[str, set[str]] = {}  # the output of a mask's Where, and of the sums that are guarded
    for node in graph.node:
        softmax = _guarded(node, producers, constants)
        if softmax is None:
            continue
        total = producers.get(softmax.input[0])
        mask = next((name for name in (total.input if total else ()) if _is_mask(producers.get(name), constants)), None)
        if total is not None and total.op_type == "Add" and mask is not None:
            guards[node.output[0]] = softmax.output[0]
            masks.setdefault(mask, set()).add(total.output[0])
    outputs = {value.name for value in graph.output}
    finite = {
        mask for mask, sums in masks.items()
        if mask not in outputs and all(node.output[0] in sums for node in graph.node if mask in node.input)
    }  # fmt: skip
    kept = {made: s for made, s in guards.items() if made not in outputs and finite & set(_summands(s, producers))}
    if not kept:
        return False
    graph.initializer.append(numpy_helper.from_array(np.array(MASKED, dtype=np.float32), _NAME))
    for mask in finite:
        producers[mask].input[2] = _NAME
    rename(graph, kept)
    drop_unread(graph)
    return True


def _guarded(node: Any, producers: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """The Softmax s of a *node* that is Where(IsNaN(s), 0, s); None of any other."""
    if node.op_type != "Where" or _scalar(node.input[1], constants) != 0:
        return None
    asked, softmax = producers.get(node.input[0]), producers.get(node.input[2])
    if asked is None or asked.op_type != "IsNaN" or asked.input[0] != node.input[2]:
        return None
    return softmax if softmax is not None and softmax.op_type == "Softmax" else None


def _is_mask(node: Any, constants: Mapping[str, Any]) -> bool:
    return (
        node is not None
        and node.op_type == "Where"
        and _scalar(node.input[1], constants) == 0
        and _scalar(node.input[2], constants) <= MASKED
    )


def _scalar(name: str, constants: Mapping[str, Any]) -> float:
    """The one float32 that *name* holds; NaN where it is anything else."""
    tensor = constants.get(name)
    if tensor is None or tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) != 1:
        return float("nan")
    return float(numpy_helper.to_array(tensor).item())


def _summands(softmax: str, producers: Mapping[str, Any]) -> list[str]:
    return list(producers[producers[softmax].input[0]].input)
