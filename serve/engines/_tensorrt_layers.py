"""Which weights a layer of a TensorRT plan computes with, told by its name.

A layer is called after the ONNX nodes that it came from, and what was fused is joined:

    /encoder/layer.0/attention/self/query/MatMul                           one node
    /encoder/layer.0/output/dense/Conv + /encoder/layer.0/output/Add       several
    node_query || node_key || node_value                                    several of one input, computed side by side
    {ForeignNode[/embeddings/Gather.../classifier/Gemm]}                    all that lies between the two: a region that
                                                                            the compiler Myelin made one layer of
    __myl_MulAddCast_myl0_3                                                 a kernel of such a region, in newer versions

A layer's Metadata lists its nodes as well, from 8.6 on; so does that of the copies around it, which compute nothing
(NoOp, Reformat, shuffle_between_...). A second or later profile's layers end with [profile 1].
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from serve.engines._onnx_nodes import Node, computing_nodes

_PROFILE = re.compile(r"\s*\[profile \d+\]$")
_REGION = re.compile(r"\{ForeignNode\[(.*?)\.\.\.(.*?)\]\}", re.S)
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_KERNEL = re.compile(r"_myl\d+_\d+$")
_JOINED = re.compile(r" \+ | \|\| ")
_MOVED = re.compile(r"^(Reformatting CopyNode|Reformatted|shuffle_between_|reformat_between_)")
_MOVES = frozenset({"NoOp", "Reformat", "Shuffle", "Constant"})
"""Kinds of layers that compute nothing."""


def plain_name(layer: str) -> str:
    """Without the profile."""
    return _PROFILE.sub("", layer)


def _parts(name: str) -> list[str]:
    return [part.strip() for part in _JOINED.split(name)]


class LayerMap:
    """The graph's nodes, and the weights that each computes with."""

    def __init__(self, nodes: Sequence[Node], weights: Iterable[str]) -> None:
        self._places = {node.name: place for place, node in enumerate(nodes) if node.name}
        self._outputs = {output: place for place, node in enumerate(nodes) for output in node.outputs}
        self._readers = {
            name: place for place, node in reversed(list(enumerate(nodes))) for name in node.inputs
        }  # the first
        self._last = len(nodes) - 1
        self._weights: dict[int, list[str]] = {}
        for weight, places in computing_nodes(nodes, weights).items():
            for place in places:
                self._weights.setdefault(place, []).append(weight)

    def weights_of(
        self, layers: Sequence[str], *, metadata: Mapping[str, str], kinds: Mapping[str, str]
    ) -> dict[str, tuple[str, ...]]:
        """By layer of *layers*, the weights that it computes with.

        metadata and kinds (LayerType): by layer, where the version tells. A layer's name goes before its metadata,
        which others may have too, and both before a region that it may lie in.
        """
        found: dict[str, list[str]] = {layer: [] for layer in layers}
        taken: set[int] = set()
        computing = [layer for layer in layers if kinds.get(layer) not in _MOVES and not _MOVED.match(layer)]
        named = [(layer, self._named(_parts(_REGION.sub("", plain_name(layer))))) for layer in computing]
        listed = [(layer, self._named(_METADATA.findall(metadata.get(layer, "")))) for layer in computing]
        for layer, places in named + listed:
            for place in places:
                if place not in taken:
                    taken.add(place)
                    found[layer] += self._weights.get(place, [])
        for layer in computing:
            for first, last in self._regions(layer):
                for place in range(first, last + 1):
                    if place in self._weights and place not in taken:
                        taken.add(place)
                        found[layer] += self._weights[place]
        return {layer: tuple(dict.fromkeys(weights)) for layer, weights in found.items()}

    def weights_named(self, layers: Iterable[str]) -> set[str]:
        """The weights of all *layers* together; what a builder's log lists."""
        return {
            weight
            for layer in layers
            for place in self._named(_parts(layer))
            for weight in self._weights.get(place, ())
        }

    def _named(self, names: Iterable[str]) -> list[int]:
        """The nodes that have one of *names*, or that a region's kernel is called after."""
        found = (self._places.get(name, self._places.get(_KERNEL.sub("", name))) for name in names)
        return [place for place in dict.fromkeys(found) if place is not None]

    def _regions(self, layer: str) -> list[tuple[int, int]]:
        """First and last node of each region that is named by its ends; an end that is not known is the graph's."""
        found = []
        for first, last in _REGION.findall(layer):
            starts = [place for name in _parts(first) if (place := self._end(name)) is not None]
            ends = [place for name in _parts(last) if (place := self._end(name)) is not None]
            found.append((min(starts, default=0), max(ends, default=self._last)))
        return found

    def _end(self, name: str) -> int | None:
        """Of a node, of the node that a tensor comes from, or of the first that reads a weight."""
        for table in (self._places, self._outputs, self._readers):
            if name in table:
                return table[name]
        return None
