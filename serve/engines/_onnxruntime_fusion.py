"""Attention as one operator of ONNX Runtime, in what the engine loads; the file on disk stays standard ONNX.

torch.onnx writes attention as some twenty nodes, among them a key that is transposed through two Reshapes. ONNX
Runtime and its transformer optimizer know other spellings and leave this one alone. Here each such group becomes one
node of the domain com.microsoft, for which ONNX Runtime has kernels that never write the scores to memory:

    Attention           where queries, keys and values come from one input by three MatMuls: their weights, side by
                        side, are one product
    MultiHeadAttention  elsewhere, with past and present of a decoder's cache

Softmax stays float32 inside those kernels, as export/precision.py has it. Layers may differ in their number of heads.

A text without padding needs no mask, and the fastest kernels take none: *unpadded* leaves it out, and marks a decoder's
attention as causal. What a mask is made of is read from the graph; one that is not understood stays as it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.engines import Array
from serve.engines._attention_bias import Biases
from serve.engines._attention_mask import mask_parts
from serve.engines._graph_view import DiffersError, GraphView, drop_unused

DOMAIN = "com.microsoft"
_MATRIX = 2
_HEADS = [0, 2, 1, 3]  # (batch, tokens, heads, width) to (batch, heads, tokens, width), and back


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """Queries, keys or values as they enter attention."""

    source: str
    """Of shape (batch, tokens, heads * width)."""
    width: int
    past: str = ""
    present: str = ""


@dataclass(frozen=True, kw_only=True)
class _Merged:
    """Weights side by side."""

    array: Array
    """(in, out)."""
    names: tuple[str, ...]
    """Of the initializers that it is made of."""


def merged_weights(model: Any) -> dict[str, str]:
    """Of each weight that fuse_attention put beside others: its name, and that of the initializer that holds it now."""
    return {name: each.name for each in model.graph.initializer for name in each.doc_string.splitlines()}


def fuse_attention(model: Any, *, unpadded: bool) -> int:
    """Rewrite *model* (onnx.ModelProto, its weights loaded) in place; the number of attentions that became one node.

    *unpadded*: it will only be given attention masks of ones.
    """
    import onnx

    graph = GraphView(graph=model.graph, onnx=onnx)
    known = Biases.of(graph, model)
    count = 0
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax"]:
        try:
            _fuse(graph, softmax, known, unpadded=unpadded)
        except DiffersError:
            continue
        count += 1
    if count:
        drop_unused(model.graph)
        if not any(entry.domain == DOMAIN for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return count


def _fuse(graph: GraphView, softmax: Any, known: Biases, *, unpadded: bool) -> None:
    query, key, value, scale, biases, flat = _match(graph, softmax)
    masks, causal = [], False
    for bias in biases:
        kinds = set(mask_parts(graph, bias)) if unpadded else {"unknown"}
        causal |= "causal" in kinds
        if "unknown" in kinds:
            masks.append(bias)
    hidden = [_size(graph, heads.source) for heads in (query, key, value)]
    if query.width != key.width or hidden[0] % query.width:
        raise DiffersError(softmax.name)
    helper, name = graph.onnx.helper, f"fused_{softmax.name or softmax.output[0]}"
    options = {"num_heads": hidden[0] // query.width, "unidirectional": int(causal), "scale": scale}
    products = None if key.past or value.past else _one_input(graph, (query, key, value))
    mask, added = known.bias(masks, like=products[0] if products else query.source)
    context, reshape = str(flat.output[0]), []
    if flat.input[1] in graph.initializers and graph.initializers[flat.input[1]].dims[0] == _MATRIX:
        reshape = [helper.make_node("Reshape", [f"{name}_rows", flat.input[1]], [context], name=f"{name}_flat")]
    attended = f"{name}_rows" if reshape else context
    if products is not None:
        source, weight, shift = products
        made = [
            graph.onnx.numpy_helper.from_array(array, f"{name}_{what}")
            for what, array in (("weight", weight.array), ("bias", shift))
        ]
        made[0].doc_string = "\n".join(weight.names)
        graph.graph.initializer.extend(made)
        inputs = [source, f"{name}_weight", f"{name}_bias", "", "", mask]
        node = helper.make_node(
            "Attention", inputs if mask else inputs[:3], [attended], name=name, domain=DOMAIN, qkv_hidden_sizes=hidden,
            **options,
        )  # fmt: skip
    else:
        sources = [query.source, key.source, value.source]
        inputs = [*sources, "", "", mask, key.past, value.past]
        while not inputs[-1]:
            inputs.pop()
        outputs = [attended, key.present, value.present] if key.past else [attended]
        node = helper.make_node("MultiHeadAttention", inputs, outputs, name=name, domain=DOMAIN, **options)
    _replace(graph, context, [*added, node, *reshape], {context, key.present, value.present} - {""})


def _match(graph: GraphView, softmax: Any) -> tuple[_Heads, _Heads, _Heads, float, list[str], Any]:
    """Queries, keys, values, the factor of the scores, what is added to them, and the node that joins the heads."""
    if graph.attribute(softmax, "axis") != -1:
        raise DiffersError(softmax.name)
    weights = softmax.output[0]
    if graph.readers[weights][0].op_type == "Cast":
        weights = graph.reader(weights, "Cast").output[0]
    product = graph.reader(weights, "MatMul")
    turned = graph.reader(product.output[0], "Transpose")
    if product.input[0] != weights or list(graph.attribute(turned, "perm")) != _HEADS:
        raise DiffersError(softmax.name)
    flat = graph.reader(turned.output[0], "Reshape")
    scores, biases = str(softmax.input[0]), []
    while (node := graph.producers.get(graph.past_cast(scores))) is not None and node.op_type == "Add":
        pair = [str(name) for name in node.input]
        place = next((at for at, name in enumerate(pair) if _is_product(graph, name)), None)
        if place is None:
            raise DiffersError(softmax.name)
        scores = pair[place]
        biases.append(pair[1 - place])
    scores, factor = graph.unscaled(graph.past_cast(scores))
    multiplied = graph.made_by(graph.past_cast(scores), "MatMul")
    first, left = graph.unscaled(multiplied.input[0])
    second, right = graph.unscaled(multiplied.input[1])
    value = _heads(graph, product.input[1])
    return _heads(graph, first), _turned_key(graph, second), value, factor * left * right, biases, flat


def _is_product(graph: GraphView, name: str) -> bool:
    """Whether *name* is a product of two matrices, scaled and added to or not."""
    node = graph.producers.get(graph.past_cast(name))
    if node is None:
        return False
    if node.op_type == "Add":
        return any(_is_product(graph, part) for part in node.input)
    scaled = graph.producers.get(graph.past_cast(graph.unscaled(graph.past_cast(name))[0]))
    return scaled is not None and scaled.op_type == "MatMul"


def _turned_key(graph: GraphView, name: str) -> _Heads:
    """Keys of *name*, which is (batch, heads, width, tokens)."""
    node = graph.made_by(name, "Reshape", "Transpose")
    if node.op_type == "Transpose" and list(graph.attribute(node, "perm")) == [0, 1, 3, 2]:
        return _heads(graph, str(node.input[0]))
    if node.op_type == "Transpose" and list(graph.attribute(node, "perm")) == [0, 2, 3, 1]:
        return _split(graph, graph.made_by(node.input[0], "Reshape"))
    turned = graph.made_by(node.input[0], "Transpose")
    flat = graph.made_by(turned.input[0], "Reshape")
    if node.op_type != "Reshape" or list(graph.attribute(turned, "perm")) != [0, 2, 1]:
        raise DiffersError(name)
    for shape in (node.input[1], flat.input[1]):
        for part in graph.made_by(shape, "Concat").input:
            if part not in graph.initializers:
                size = graph.made_by(graph.made_by(part, "Slice").input[0], "Shape")
                if size.input[0] != flat.input[0]:
                    raise DiffersError(name)
    return _heads(graph, str(flat.input[0]))


def _heads(graph: GraphView, name: str) -> _Heads:
    """What (batch, heads, tokens, width) is made of."""
    node = graph.made_by(name, "Transpose", "Concat")
    past = present = ""
    if node.op_type == "Concat":
        if graph.attribute(node, "axis") not in (-2, 2) or len(node.input) != 2 or name not in graph.results:
            raise DiffersError(name)
        past, present = str(node.input[0]), name
        node = graph.made_by(node.input[1], "Transpose")
    if list(graph.attribute(node, "perm")) != _HEADS:
        raise DiffersError(name)
    return _split(graph, graph.made_by(node.input[0], "Reshape"), past=past, present=present)


def _split(graph: GraphView, split: Any, *, past: str = "", present: str = "") -> _Heads:
    """The heads that a Reshape to (batch, tokens, heads, width) parts."""
    if split.input[1] in graph.initializers:
        width = int(graph.constant(split.input[1])[-1])
    else:
        width = int(graph.constant(graph.made_by(split.input[1], "Concat").input[-1])[0])
    if width < 1:
        raise DiffersError(split.name)
    return _Heads(source=str(split.input[0]), width=width, past=past, present=present)


def _linear(graph: GraphView, name: str) -> tuple[str, str, Array, Array]:
    """Input, weight's name, weight (in, out) and bias (out,) of a linear layer, written as MatMul and Add.

    Raises DiffersError.
    """
    total = graph.made_by(name, "Add")
    for product, bias in (total.input, reversed(list(total.input))):
        made = graph.producers.get(product)
        if made is not None and made.op_type == "MatMul":
            weight, added = graph.constant(made.input[1]), graph.constant(bias)
            if weight.ndim == 2 and added.shape == weight.shape[1:]:
                return str(made.input[0]), str(made.input[1]), weight, added
    raise DiffersError(name)


def _one_input(graph: GraphView, heads: Iterable[_Heads]) -> tuple[str, _Merged, Array] | None:
    """One input, and weights and biases side by side; None where they are not three linear layers of one input."""
    try:
        layers = [_linear(graph, each.source) for each in heads]
    except DiffersError:
        return None
    if len({source for source, *_ in layers}) != 1:
        return None
    array = np.ascontiguousarray(np.concatenate([weight for _, _, weight, _ in layers], axis=1))
    merged = _Merged(array=array, names=tuple(name for _, name, _, _ in layers))
    return layers[0][0], merged, np.concatenate([bias for *_, bias in layers])


def _size(graph: GraphView, name: str) -> int:
    """The last dimension of a linear layer's output, or of a part of one; raises DiffersError."""
    try:
        return int(_linear(graph, name)[2].shape[1])
    except DiffersError:
        pass
    split = graph.made_by(name, "Split", "Reshape")
    if split.op_type == "Split":
        if len(split.input) > 1 and split.input[1]:
            return int(graph.constant(split.input[1])[list(split.output).index(name)])
        return _size(graph, split.input[0]) // len(split.output)
    weight = graph.made_by(split.input[0], "Gemm")
    turned = any(entry.name == "transB" and entry.i for entry in weight.attribute)
    return int(graph.constant(weight.input[1]).shape[0 if turned else 1])


def _replace(graph: GraphView, context: str, nodes: list[Any], made: set[str]) -> None:
    """Put *nodes* where *context* was computed; nodes that computed *made* go."""
    kept = []
    for node in graph.graph.node:
        if context in node.output:
            kept += nodes
        elif not made & set(node.output):
            kept.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(kept)
