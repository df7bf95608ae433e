"""Where the values of an ONNX graph come from and go to: for matching groups of nodes."""

from dataclasses import dataclass, field
from typing import Any

from serve.engines import Array

LARGEST = 1_900_000_000
"""Bytes of a model that is rewritten: a session takes one from memory up to protobuf's 2 GB."""


class DiffersError(Exception):
    """A group of nodes is not what is looked for."""


@dataclass(kw_only=True)
class GraphView:
    """Where the values of a graph come from and go to."""

    graph: Any
    onnx: Any
    producers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, list[Any]] = field(default_factory=dict)
    initializers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        for node in self.graph.node:
            self.producers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.results = {value.name for value in self.graph.output}

    def made_by(self, name: str, *operators: str) -> Any:
        """The node that computes *name*, one of *operators*; raises DiffersError."""
        node = self.producers.get(name)
        if node is None or node.op_type not in operators:
            raise DiffersError(name)
        return node

    def is_made_by(self, name: str, operator: str) -> bool:
        """Whether an *operator* computes *name*."""
        node = self.producers.get(name)
        return node is not None and bool(node.op_type == operator)

    def reader(self, name: str, *operators: str) -> Any:
        """The only node that reads *name*; raises DiffersError."""
        found = self.readers.get(name, [])
        if len(found) != 1 or found[0].op_type not in operators or name in self.results:
            raise DiffersError(name)
        return found[0]

    def past_cast(self, name: str) -> str:
        """*name*, or what it is a cast of."""
        node = self.producers.get(name)
        return str(node.input[0]) if node is not None and node.op_type == "Cast" else name

    def constant(self, name: str) -> Array:
        """The number or numbers stored as *name*, cast where the graph casts them; raises DiffersError."""
        if name in self.initializers:
            array: Array = self.onnx.numpy_helper.to_array(self.initializers[name])
            return array
        node = self.made_by(name, "Cast")
        return self.constant(node.input[0]).astype(
            self.onnx.helper.tensor_dtype_to_np_dtype(self.attribute(node, "to"))
        )

    def attribute(self, node: Any, name: str) -> Any:
        """The value of an attribute; raises DiffersError where the node has none."""
        for entry in node.attribute:
            if entry.name == name:
                return self.onnx.helper.get_attribute_value(entry)
        raise DiffersError(name)

    def unscaled(self, name: str) -> tuple[str, float]:
        """*name* before it is multiplied with or divided by a number, and that factor."""
        node = self.producers.get(name)
        if node is None or node.op_type not in ("Mul", "Div"):
            return name, 1.0
        places = (0, 1) if node.op_type == "Mul" else (0,)
        for place in places:
            other = node.input[1 - place]
            if other in self.initializers and not self.initializers[other].dims:
                factor = float(self.constant(other))
                return str(node.input[place]), factor if node.op_type == "Mul" else 1 / factor
        return name, 1.0

    def put(self, node: Any, *instead: Any) -> None:
        """*instead* in the place of *node*."""
        place = next(at for at, other in enumerate(self.graph.node) if other is node or other.output == node.output)
        nodes = list(self.graph.node)
        nodes[place : place + 1] = instead
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def drop(self, node: Any) -> None:
        """Take *node* out."""
        self.put(node)


def drop_unused(graph: Any) -> None:
    """Take out nodes and initializers of *graph* (GraphProto, nodes in order) that nothing reads."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read & set(node.output):
            read |= set(node.input)
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)


def in_order(graph: Any) -> None:
    """Put each node of *graph* (GraphProto) behind those that it reads, and otherwise leave the order."""
    made = {name for node in graph.node for name in node.output if name}
    waiting, done = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if made & set(node.input):
                later.append(node)
            else:
                done.append(node)
                made -= set(node.output)
        assert len(later) < len(waiting)
        waiting = later
    del graph.node[:]
    graph.node.extend(done)
