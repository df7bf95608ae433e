"""Write a graph of opset 18 in the form of opset 17, the newest that TensorRT 8.6 reads.

torch.onnx writes opset 18 at least. Between the two, a few operators took an attribute as an input or got a new one;
where the new form says what the old one can say, it is written in the old one. onnx's own converter is not used: it
leaves num_outputs on Split, which runtimes then refuse, and stops at a ReduceMean, which every Llama has.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_FROM, _TO = 18, 17


def lower_to_17(model: Any) -> str | None:
    """Rewrite *model* (onnx.ModelProto, opset 18) in place; or say why not, in words, and leave it as it was.

    Requires: opset 18, no local functions, no subgraph with an operator of another form.
    Ensures: opset 17, and the same answers; every operator is one whose definition at 17 is the same as at 18, or that
    was rewritten here.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    edits: list[Callable[[], None]] = []
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or not _changed(node.op_type):
            continue
        edit = _rewrite(node, constants)
        if edit is None:
            return f"{node.op_type} has no form in opset {_TO} that says the same"
        edits.append(edit)
    if model.functions or any(_has_subgraph(node) for node in model.graph.node):
        return "it holds subgraphs or local functions"
    for edit in edits:
        edit()
    _drop_unused(model.graph, constants)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = _TO
    return None


def _changed(op_type: str) -> bool:
    """Whether opset 18 defines the operator anew, or for the first time."""
    return bool(onnx.defs.get_schema(op_type, _FROM).since_version == _FROM)


def _has_subgraph(node: Any) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _rewrite(node: Any, constants: Mapping[str, Any]) -> Callable[[], None] | None:
    """What turns *node* into its older form, or None where nothing does."""
    if node.op_type == "Split":
        return _equal_split(node)
    if node.op_type.startswith("Reduce"):
        return _reduce(node, constants)
    if node.op_type in ("ScatterElements", "ScatterND"):  # 18 added max and min
        return _keep if _attribute(node, "reduction") in (None, b"none", b"add", b"mul") else None
    return _keep if node.op_type == "Pad" and len(node.input) < 4 else None  # 18 added axes


def _keep() -> None:
    """The two forms are the same."""


def _attribute(node: Any, name: str) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def _equal_split(node: Any) -> Callable[[], None] | None:
    """Below 18 a Split without sizes has as many equal parts as outputs. Unequal ones fail in the comparison."""
    if _attribute(node, "num_outputs") not in (None, len(node.output)):
        return None
    return lambda: _remove_attribute(node, "num_outputs")


def _remove_attribute(node: Any, name: str) -> None:
    for entry in [entry for entry in node.attribute if entry.name == name]:
        node.attribute.remove(entry)


def _reduce(node: Any, constants: Mapping[str, Any]) -> Callable[[], None] | None:
    """Below 18 the axes are an attribute (of ReduceSum they have been an input since 13)."""
    if _attribute(node, "noop_with_empty_axes"):
        return None
    axes: list[int] | None = None
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in constants:
            return None
        axes = np.atleast_1d(numpy_helper.to_array(constants[node.input[1]])).tolist()

    def edit() -> None:
        _remove_attribute(node, "noop_with_empty_axes")
        del node.input[1:]
        if axes is not None:
            node.attribute.append(helper.make_attribute("axes", axes))

    return edit


def _drop_unused(graph: Any, constants: Mapping[str, Any]) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for name, tensor in constants.items():
        if name not in used:
            graph.initializer.remove(tensor)
