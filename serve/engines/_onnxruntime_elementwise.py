"""What lies between the products of a transformer, as few operators of ONNX Runtime: one pass over memory each.

    SkipLayerNormalization  a bias, the residual sum, and the normalization of it
    BiasGelu, Gelu          GELU with the error function, with the bias before it where there is one
    FastGelu                GELU with tanh

ONNX Runtime has such fusions itself, but leaves out sums whose shapes it cannot infer, as those here, and the constants
of a GELU in fp16. Types stay: a sum in float32 is a SkipLayerNormalization in float32.
"""

import math
from collections.abc import Callable
from typing import Any

from serve.engines._graph_view import DiffersError, GraphView, drop_unused, in_order

DOMAIN = "com.microsoft"
_CLOSE = 2e-3
"""Relative; a constant in fp16 is within 5e-4 of the number that it stands for."""


def fuse_elementwise(model: Any) -> int:
    """Rewrite *model* (onnx.ModelProto, its weights loaded) in place; the number of groups that became one node."""
    import onnx

    count = 0
    for operator, fuse in (("Erf", _gelu), ("Tanh", _tanh_gelu), ("LayerNormalization", _sum_and_norm)):
        graph = GraphView(graph=model.graph, onnx=onnx)
        for node in [node for node in model.graph.node if node.op_type == operator]:
            count += _tried(fuse, graph, node)
        in_order(model.graph)
        drop_unused(model.graph)
    if count and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return count


def _tried(fuse: Callable[[GraphView, Any], None], graph: GraphView, node: Any) -> bool:
    try:
        fuse(graph, node)
    except DiffersError:
        return False
    return True


def _gelu(graph: GraphView, erf: Any) -> None:
    """x * (1 + erf(x / sqrt(2))) * 0.5."""
    x, factor = graph.unscaled(erf.input[0])
    if not math.isclose(factor, 1 / math.sqrt(2), rel_tol=_CLOSE):
        raise DiffersError(erf.name)
    product = graph.reader(_plus_one(graph, erf.output[0]), "Mul")
    half = graph.reader(product.output[0], "Mul")
    if x not in product.input or not math.isclose(graph.unscaled(half.output[0])[1], 0.5):
        raise DiffersError(erf.name)
    name, result = f"fused_{erf.name or erf.output[0]}", half.output[0]
    try:
        if len(graph.readers[x]) != len({erf.name, product.name}):
            raise DiffersError(x)
        source, bias = _bias(graph, x)
    except DiffersError:
        graph.put(half, graph.onnx.helper.make_node("Gelu", [x], [result], name=name, domain=DOMAIN))
        return
    graph.put(half, graph.onnx.helper.make_node("BiasGelu", [source, bias], [result], name=name, domain=DOMAIN))


def _tanh_gelu(graph: GraphView, tanh: Any) -> None:
    """x * 0.5 * (1 + tanh(0.79788 * (x + 0.044715 * x ** 3)))."""
    inner, factor = graph.unscaled(tanh.input[0])
    total = graph.made_by(inner, "Add")
    x, cube = total.input
    cubed, share = graph.unscaled(cube)
    power = graph.made_by(cubed, "Pow")
    right = power.input[0] == x and math.isclose(float(graph.constant(power.input[1])), 3)
    right &= math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=_CLOSE)
    right &= math.isclose(share, 0.044715, rel_tol=_CLOSE)
    product = graph.reader(_plus_one(graph, tanh.output[0]), "Mul")
    others = [name for name in product.input if graph.producers.get(name) is not graph.producers.get(x)]
    halves = [graph.unscaled(graph.past_cast(name)) for name in others]
    if not right or (graph.past_cast(x), 0.5) not in [(graph.past_cast(name), scale) for name, scale in halves]:
        raise DiffersError(tanh.name)
    name = f"fused_{tanh.name or tanh.output[0]}"
    node = graph.onnx.helper.make_node("FastGelu", [x], [product.output[0]], name=name, domain=DOMAIN)
    graph.put(product, node)


def _sum_and_norm(graph: GraphView, norm: Any) -> None:
    """LayerNormalization of a + b, or of a + bias + b; their sum is a result as well where others read it."""
    if len(norm.input) != 3 or graph.attribute(norm, "axis") != -1:
        raise DiffersError(norm.name)
    total = norm.input[0]
    parts = graph.made_by(total, "Add").input
    if any(part in graph.initializers or graph.is_made_by(graph.past_cast(part), "Gather") for part in parts):
        raise DiffersError(norm.name)  # embeddings: one of them may be the same for each row
    first, second, bias = parts[0], parts[1], ""
    for one, other in (tuple(parts), tuple(reversed(parts))):
        try:
            if len(graph.readers[one]) == 1:
                first, bias = _bias(graph, one)
                second = other
                break
        except DiffersError:
            continue
    others = len(graph.readers[total]) > 1 or total in graph.results
    inputs = [first, second, norm.input[1], norm.input[2], *([bias] if bias else [])]
    outputs = [norm.output[0], "", "", total] if others else [norm.output[0]]
    node = graph.onnx.helper.make_node(
        "SkipLayerNormalization", inputs, outputs, name=f"fused_{norm.name or norm.output[0]}", domain=DOMAIN,
        epsilon=graph.attribute(norm, "epsilon"),
    )  # fmt: skip
    graph.put(norm, node)
    if others:
        graph.drop(graph.producers[total])


def _plus_one(graph: GraphView, name: str) -> str:
    """The name of *name* + 1."""
    total = graph.reader(name, "Add")
    (other,) = [part for part in total.input if part != name]
    if other not in graph.initializers or float(graph.constant(other).reshape(-1)[0]) != 1:
        raise DiffersError(name)
    return str(total.output[0])


def _bias(graph: GraphView, name: str) -> tuple[str, str]:
    """What *name* is the sum of: a product, and a vector that is stored, or a cast of one."""
    total = graph.made_by(name, "Add")
    for product, bias in (tuple(total.input), tuple(reversed(total.input))):
        if graph.is_made_by(product, "MatMul") and graph.constant(bias).ndim == 1:
            return str(product), str(bias)
    raise DiffersError(name)
