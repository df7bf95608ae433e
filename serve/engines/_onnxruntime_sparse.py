"""Products with sparse weights as an operator of our own: a graph in which ONNX Runtime's CPU provider skips the zeros.

Every MatMul or Gemm of float32 with a constant weight that is sparse enough becomes an operator of domain pst
(sparse_cpu/sparse_linear.c), together with the bias that is added to it: TwoOfFourLinear where the zeros are in 2:4,
SparseLinear where they are anywhere. Everything else stays ONNX Runtime's.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.manifest import WeightInfo, load
from pst.errors import ArtifactError, EngineError
from serve.engines import PAST, Array, LayerTime, Verdict
from serve.engines._graph_view import LARGEST, DiffersError, GraphView, drop_unused
from serve.engines._onnxruntime_profile import OnnxRuntimeProfiler
from serve.engines._sparse_layout import ANYWHERE, as_two_of_four, block_of, densest, form_of, in_blocks
from serve.engines._sparse_library import sparse_library

SMALLEST = 2**10
"""Entries of a weight from which on it is worth the trouble."""
DOMAIN = "pst"
OLDEST = (1, 18)
"""Version of ONNX Runtime that has all functions which the operator calls."""
CHOSEN = "{kernel} of this package multiplied the {share:.0%} that are not zero, and nothing else"
TOO_DENSE = "{share:.0%} of it are not zero, and skipping zeros pays up to {most:.0%}"
TOO_DENSE_OF_FEW = TOO_DENSE + " where a few tokens are read at a time, or in 2:4"
SPARSER = "a higher --sparsity, unstructured; or remove whole heads and neurons (--pattern structured)"
OTHER_FORM = "the kernel takes float32 weights of MatMul and Gemm"
OTHER_ADVICE = "export with --precision fp32 --linear-form matmul"


@dataclass(kw_only=True)
class SparseGraph:
    """A graph with sparse operators."""

    content: bytes = b""
    """The model, for a session with the operator's library."""
    held: dict[str, str] = field(default_factory=dict)
    """By the name of each weight that is skipped through: the initializer that holds what is not zero of it."""
    operators: dict[str, str] = field(default_factory=dict)
    """By its name, too: the operator."""
    too_dense: dict[str, float] = field(default_factory=dict)
    """Other weights of such products, and the share that is not zero."""
    few: bool = False
    """Whether it reads one token or a few at a time: a language model with a cache."""

    def explain(self, weight: WeightInfo, *, pattern: str, place: LayerTime | None) -> Verdict:
        """See Profiler."""
        if weight.initializer in self.held:
            return Verdict(eligible=True, chosen=True, why=self._chosen(weight))
        if weight.initializer in self.too_dense:
            share = self.too_dense[weight.initializer]
            why = (TOO_DENSE_OF_FEW if self.few else TOO_DENSE).format(share=share, most=densest(few=self.few))
            return Verdict(eligible=False, chosen=False, why=why, advice=SPARSER)
        return Verdict(eligible=False, chosen=False, why=OTHER_FORM, advice=OTHER_ADVICE)

    def _chosen(self, weight: WeightInfo) -> str:
        return CHOSEN.format(kernel=self.operators[weight.initializer], share=weight.density)


class SparseProfiler:
    """See serve.engines.Profiler: ONNX Runtime's own, with what became of the zeros in a graph with such operators."""

    def __init__(
        self, runtime: Any, model: Path, graph: SparseGraph, *, original: Path, options: Any, providers: Any
    ) -> None:
        """*model*: the file of *graph*; *original*: the artifact's; *options* (SessionOptions) with the library."""
        profiler = OnnxRuntimeProfiler(
            runtime, model, options=options, providers=providers, original=original, merged=graph.held
        )
        self.run, self.finish, self.explain = profiler.run, profiler.finish, graph.explain


@dataclass(frozen=True, kw_only=True)
class _Product:
    node: Any
    weight: Array
    """(outputs, inputs)"""
    bias: str
    """The initializer that is added; empty where there is none."""
    last: Any
    """The node whose output is the product with its bias."""


def sparse_graph(model: Path | bytes, *, threads: int, few: bool = False) -> SparseGraph:
    """The *model*, a file or its content, with sparse operators, which use *threads*.

    *few*: it reads a few tokens at a time, as every model with a cache is taken to do. None of the operators, and no
    content, where no product has a weight that is sparse enough. Raises EngineError where the package onnx is missing
    or the model is too large, ArtifactError for what is no model.
    """
    try:
        onnx: Any = importlib.import_module("onnx")
    except ImportError as error:
        raise EngineError("onnx is needed to put sparse kernels into a graph; run: pip install onnx.") from error
    try:
        loaded = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(str(model))
    except Exception as error:  # protobuf's errors, and the system's for a second file
        raise ArtifactError(f"{model!s:.200} is not a whole ONNX model; export it again.") from error
    found = SparseGraph(few=few or any(value.name.startswith(PAST) for value in loaded.graph.input))
    graph = GraphView(graph=loaded.graph, onnx=onnx)
    for node in [node for node in loaded.graph.node if node.op_type in ("MatMul", "Gemm")]:
        try:
            product = _product(graph, node)
        except DiffersError:
            continue
        name, share = str(node.input[1]), np.count_nonzero(product.weight) / product.weight.size
        if operator := form_of(product.weight, share, few=found.few):
            found.operators[name] = operator
            found.held[name] = _replace(graph, product, operator, block=block_of(share), threads=threads)
        else:
            found.too_dense[name] = share
    if not found.held:
        return found
    loaded.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    tensors = list(graph.initializers.values())
    del loaded.graph.initializer[:]
    made = onnx.ModelProto()  # for protobuf frees the weights that were replaced with their model alone
    made.CopyFrom(loaded)
    drop_unused(made.graph)
    read = {name for node in made.graph.node for name in node.input}
    tensors = [tensor for tensor in tensors if tensor.name in read]
    if sum(tensor.ByteSize() for tensor in tensors) > LARGEST:  # of all, protobuf cannot tell
        raise EngineError("The model is too large for sparse kernels, which take up to 1.9 GB; choose onnxruntime.")
    made.graph.initializer.extend(tensors)
    del loaded, graph, tensors, product, node
    found.content = made.SerializeToString()
    return found


def may_skip_zeros(folder: Path) -> bool:
    """Whether export.json in *folder* tells of a float32 model with a weight that is sparse enough."""
    try:
        made = load(folder, verify=False)
    except ArtifactError:  # there is none, or something is missing, which whoever opens the model says
        return False
    most = densest(few=any(value.name.startswith(PAST) for value in made.inputs))
    found = ((each.density, each.pattern or made.pattern) for each in made.weights)
    return made.precision == "fp32" and any(density <= most or pattern == "2:4" for density, pattern in found)


def register(options: Any, runtime: Any) -> None:
    """Give *options* (SessionOptions) the operator. Raises EngineError without a compiler, or for an old runtime."""
    if tuple(int(part) for part in runtime.__version__.split(".")[:2]) < OLDEST:
        raise EngineError(
            f"Sparse kernels need ONNX Runtime {OLDEST[0]}.{OLDEST[1]} or newer; run: pip install -U onnxruntime."
        )
    options.register_custom_ops_library(str(sparse_library()))


def _product(graph: GraphView, node: Any) -> _Product:
    """*node* with its weight and bias; raises DiffersError where it is no product with a constant float32 matrix."""
    weight = graph.constant(node.input[1]) if node.input[1] in graph.initializers else None
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or weight.size < SMALLEST:
        raise DiffersError(node.name)
    if node.op_type == "Gemm":
        given = {each.name: graph.onnx.helper.get_attribute_value(each) for each in node.attribute}
        if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
            raise DiffersError(node.name)
        by_row = weight if given.get("transB", 0) else weight.T
        bias = node.input[2] if len(node.input) > 2 else ""
        return _Product(node=node, weight=by_row, bias=_vector(graph, bias, len(by_row)) if bias else "", last=node)
    by_row = weight.T
    try:
        add = graph.reader(node.output[0], "Add")
        other = next(name for name in add.input if name != node.output[0])
        return _Product(node=node, weight=by_row, bias=_vector(graph, other, len(by_row)), last=add)
    except (DiffersError, StopIteration):
        return _Product(node=node, weight=by_row, bias="", last=node)


def _vector(graph: GraphView, name: str, length: int) -> str:
    """*name*, a constant with one float32 number for each output; raises DiffersError."""
    if name not in graph.initializers:
        raise DiffersError(name)
    value = graph.constant(name)
    if value.shape != (length,) or value.dtype != np.float32:
        raise DiffersError(name)
    return name


def _replace(graph: GraphView, product: _Product, operator: str, *, block: int, threads: int) -> str:
    """Put *operator* in the place of *product*; the name of the initializer with the weights that are not zero."""
    weight, name = np.ascontiguousarray(product.weight), product.node.input[1]
    is_anywhere = operator == ANYWHERE
    made_of = in_blocks(weight, block) if is_anywhere else as_two_of_four(weight)
    attributes = {"threads": threads} | ({"block": block} if is_anywhere else {})
    parts = {f"{name}.{part}": value for part, value in made_of.items()}
    if not product.bias:
        parts[f"{name}.no_bias"] = np.zeros(len(weight), np.float32)
    inputs = [product.node.input[0], *parts, *filter(None, [product.bias])]
    for part, value in parts.items():
        if part not in graph.initializers:  # of a weight that two products share
            graph.initializers[part] = graph.onnx.numpy_helper.from_array(np.ascontiguousarray(value), part)
    made = graph.onnx.helper.make_node(
        operator, inputs, [product.last.output[0]], name=product.node.name, domain=DOMAIN, **attributes
    )
    product.node.Clear()  # where it was, an operator that nothing reads would stay: drop_unused takes it out
    product.last.CopyFrom(made)
    return f"{name}.values"
