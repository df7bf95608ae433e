"""The nodes of an ONNX file and who computes with which weight, read without the package onnx.

A serving machine need not have it. Of the file's protobuf only what is needed is looked at, and weights are skipped:
ModelProto.graph is field 7, GraphProto.node field 1, and of NodeProto input, output, name and op_type are 1 to 4.
Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto and https://protobuf.dev/programming-guides/encoding/
"""

import mmap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pst.errors import ArtifactError

FORMS = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that change a weight's form and compute nothing with it."""
_GRAPH, _NODE = 7, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of the graph."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(file: Path) -> tuple[Node, ...]:
    """The nodes in the file's order, which is topological. Raises ArtifactError for what is no ONNX file."""
    try:
        with file.open("rb") as stream:
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped with its last user
        return tuple(_node(node) for graph in _fields(data, _GRAPH) for node in _fields(graph, _NODE))
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(f"{file} is not a whole ONNX model; export it again.") from error


def computing_nodes(nodes: Sequence[Node], weights: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """By weight, the places of the nodes that compute with it, past those that only change its form."""
    readers: dict[str, list[int]] = defaultdict(list)
    for place, node in enumerate(nodes):
        for name in node.inputs:
            readers[name].append(place)

    def find(tensor: str) -> Iterator[int]:
        for place in readers.get(tensor, ()):
            if nodes[place].operator in FORMS:
                for output in nodes[place].outputs:
                    yield from find(output)
            else:
                yield place

    return {weight: tuple(dict.fromkeys(find(weight))) for weight in weights}


def _node(data: memoryview) -> Node:
    parts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    for field, value in _walk(data):
        if field in parts:
            parts[field].append(str(value, "utf-8"))
    return Node(name="".join(parts[3]), operator="".join(parts[4]), inputs=tuple(parts[1]), outputs=tuple(parts[2]))


def _fields(data: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for field, value in _walk(data) if field == wanted)


def _walk(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of one message that have a length, in their order."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
