"""Write linear layers that the exporter gave as Gemm (GPT-2's) as MatMul and Add, so that every model's look alike.

    (B, S, k) --Reshape--> (B S, k) --Gemm W, b--> (B S, n) --Reshape--> (B, S, n)
    (B, S, k) --MatMul W (k, n)--> (B, S, n) --Add b--> (B, S, n)

Where the Reshape joins heads as well, (B, S, h, d) to rows, one to (B, S, h d) takes its place.

Requires: of *weights*, those that Gemm alone reads, with alpha = beta = 1 and transA = 0, are rewritten; others keep
their form. Where rows are made by a Reshape and unmade by another one, to rank 3, batch and sequence are the same
before and after.
Ensures: each of these weights is read by MatMul as (k, n), so that its reduction axis is 0; the bias is added after it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from export.passes._layout import Array, drop_unread, infer_shapes


def run(model: Any, weights: Mapping[str, Array]) -> bool:
    """Rewrite *model* in place."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    targets = {
        name for name in weights
        if name in constants and readers.get(name) and all(_plain_gemm(node, name) for node in readers[name])
        and len({_transposed(node) for node in readers[name]}) == 1
    }  # fmt: skip
    if not targets:
        return False
    shapes = infer_shapes(model)
    producers = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    nodes, done = [], set[str]()
    for node in graph.node:
        if node.output[0] in done:
            continue
        if node.op_type != "Gemm" or node.input[1] not in targets:
            nodes.append(node)
            continue
        source, made = node.input[0], node.output[0]
        rows, back = producers.get(source), readers.get(made, [])
        whole = _whole(rows, shapes, shapes[source][-1])
        if (
            rows is not None and whole and made not in outputs and len(back) == 1 and back[0].op_type == "Reshape"
            and _may_be(shapes.get(back[0].output[0], ()), shapes[made][-1])
        ):  # fmt: skip
            source, made = rows.input[0], back[0].output[0]
            if whole == 4:  # heads, which the same Reshape joins
                shape = f"joined_{shapes[node.input[0]][-1]}"
                if shape not in constants:
                    target = np.array([0, 0, shapes[node.input[0]][-1]], dtype=np.int64)
                    constants[shape] = numpy_helper.from_array(target, shape)
                    graph.initializer.append(constants[shape])
                nodes.append(helper.make_node("Reshape", [source, shape], [f"{made}_joined"], name=f"{made}_join"))
                source = f"{made}_joined"
            done.add(made)
        nodes += _layer(node, source, made)
    for name in targets:
        if _transposed(readers[name][0]):
            array = np.ascontiguousarray(numpy_helper.to_array(constants[name]).T)
            constants[name].CopyFrom(numpy_helper.from_array(array, name))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unread(graph)
    return True


def _whole(rows: Any, shapes: Mapping[str, tuple[str | int, ...]], width: str | int) -> int:
    """The rank of what the node *rows* makes rows of *width* of: (B, S, k) or (B, S, h, d); 0 where it does not."""
    if rows is None or rows.op_type != "Reshape":
        return 0
    shape = shapes.get(rows.input[0], ())
    if len(shape) == 3:
        return 3 if shape[-1] == width else 0
    known = [size for size in shape[2:] if isinstance(size, int)]
    return 4 if len(shape) == 4 and len(known) == 2 and known[0] * known[1] == width else 0


def _may_be(shape: tuple[str | int, ...], width: str | int) -> bool:
    """Whether *shape*, of which a symbol may stand for any number, is of rank 3 and ends in *width*."""
    return len(shape) == 3 and (shape[-1] == width or isinstance(shape[-1], str))


def _plain_gemm(node: Any, weight: str) -> bool:
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    return (
        node.op_type == "Gemm"
        and node.input[1] == weight
        and node.input[0] != weight
        and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        and not attributes.get("transA", 0)
    )


def _transposed(node: Any) -> bool:
    return any(entry.name == "transB" and entry.i for entry in node.attribute)


def _layer(node: Any, source: str, made: str) -> list[Any]:
    bias = list(node.input[2:])
    product = f"{made}_product" if bias else made
    layer = [helper.make_node("MatMul", [source, node.input[1]], [product], name=node.name)]
    if bias:
        layer.append(helper.make_node("Add", [product, *bias], [made], name=f"{made}_bias"))
    return layer
