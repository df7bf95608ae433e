"""A decoder's cache in the GPU's memory: what a step writes as present is what the next one reads as past.

Keys and values of all layers lie in one block, which is never written to again, so that copies of a cache share it.
Blocks that nobody has any more are used again: a step then takes one of two in turn, and nothing is allocated.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import numpy as np

from pst.errors import EngineError
from serve.engines import LOGITS, PAST, PRESENT, Array, TensorSpec, cache_inputs, check_feeds
from serve.engines._cuda import ALIGNMENT, Cuda, Sizes, layout
from serve.engines._sizes import sizes_of

if TYPE_CHECKING:
    from serve.engines.tensorrt import TensorRTEngine


class Block:
    """Device memory that goes back to its pool with its last user."""

    def __init__(self, pool: "Pool", address: int, size: int) -> None:
        self._pool, self.address, self._size = pool, address, size

    def __del__(self) -> None:
        """See the class."""
        self._pool.give_back(self.address, self._size)


class Pool:
    """Blocks of device memory, each of a power of two bytes."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda: Cuda | None = cuda
        self._free: dict[int, list[int]] = {}
        self._all: set[int] = set()

    def take(self, size: int) -> Block:
        """At least *size* bytes. Raises EngineError where the GPU has no room, even without the unused blocks."""
        if self._cuda is None:
            raise EngineError("The engine is closed; open it again.")
        size = max(ALIGNMENT, 1 << (size - 1).bit_length())
        unused = self._free.get(size)
        if unused:
            return Block(self, unused.pop(), size)
        try:
            address = self._cuda.allocate(size)
        except EngineError:
            self._drop_unused()
            address = self._cuda.allocate(size)
        self._all.add(address)
        return Block(self, address, size)

    def give_back(self, address: int, size: int) -> None:
        """What a Block does when it goes."""
        if self._cuda is not None:
            self._free.setdefault(size, []).append(address)

    def close(self) -> None:
        """Free all of it; blocks that are still held are worth nothing then."""
        cuda, self._cuda = self._cuda, None
        for address in self._all if cuda is not None else ():
            assert cuda is not None
            cuda.free(address)
        self._all.clear()
        self._free.clear()

    def _drop_unused(self) -> None:
        assert self._cuda is not None
        for addresses in self._free.values():
            for address in addresses:
                self._cuda.free(address)
                self._all.discard(address)
        self._free.clear()


class TensorRTCache:
    """See serve.engines.Cache."""

    def __init__(self, engine: "TensorRTEngine", block: Block, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """*block* holds arrays of *shapes*, by the names of the inputs that take them, as layout places them."""
        self._engine, self._block, self._shapes = engine, block, dict(shapes)

    @classmethod
    def of(cls, engine: "TensorRTEngine", past: Mapping[str, Array]) -> Self:
        """From arrays, which are copied."""
        specs = cache_inputs(engine.inputs)
        check_feeds(specs, past, max_length=None)
        arrays = {name: np.ascontiguousarray(past[name]) for name in specs}
        offsets, size = layout([(array.shape, specs[name].dtype) for name, array in arrays.items()])
        block = engine.pool.take(size)
        for offset, array in zip(offsets, arrays.values(), strict=True):
            engine.cuda.write(block.address + offset, array)
        return cls(engine, block, {name: array.shape for name, array in arrays.items()})

    def extend(self, feeds: Mapping[str, Array]) -> Array:
        """See Cache."""
        engine = self._engine
        given = {name: spec for name, spec in engine.inputs.items() if name not in self._shapes}
        check_feeds(given, feeds, max_length=engine.max_length)
        self._check_sums(given, feeds)
        lane = engine.lane({**{name: feeds[name].shape for name in given}, **self._shapes})
        offsets, _ = layout(self._sizes(self._shapes))
        past = {
            name: (self._block.address + offset, shape)
            for offset, (name, shape) in zip(offsets, self._shapes.items(), strict=True)
        }
        shapes = lane.shape(feeds, {name: shape for name, (_, shape) in past.items()})
        present = {name: shapes[name.replace(PAST, PRESENT, 1)] for name in self._shapes}
        offsets, size = layout(self._sizes(present))
        block = engine.pool.take(size)
        addresses = {name: address for name, (address, _) in past.items()} | {
            name.replace(PAST, PRESENT, 1): block.address + offset
            for offset, name in zip(offsets, present, strict=True)
        }
        scores = engine.pool.take(layout([(shapes[LOGITS], engine.outputs[LOGITS].dtype)])[1])
        logits = lane.extend(feeds, {**addresses, LOGITS: scores.address}, shapes[LOGITS])
        self._block, self._shapes = block, present
        return logits

    def copy(self) -> Self:
        """See Cache."""
        return type(self)(self._engine, self._block, self._shapes)

    def arrays(self) -> dict[str, Array]:
        """See Cache."""
        sizes = self._sizes(self._shapes)
        return {
            name: self._engine.cuda.read(self._block.address + offset, shape, dtype)
            for name, offset, (shape, dtype) in zip(self._shapes, layout(sizes)[0], sizes, strict=True)
        }

    def _check_sums(self, given: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> None:
        """TensorRT would compute something where the mask is shorter than past and tokens together."""
        sizes = sizes_of(given, {name: feeds[name].shape for name in given})
        sizes |= sizes_of({name: self._engine.inputs[name] for name in self._shapes}, self._shapes)
        for name, spec in given.items():
            for symbol, length in zip(spec.shape, feeds[name].shape, strict=True):
                parts = symbol.split(" + ") if isinstance(symbol, str) else []
                total = sum(sizes.get(part, 0) for part in parts)
                if len(parts) > 1 and total != length:
                    raise EngineError(f"Input {name} must be {total} long, past and new tokens, but is {length}.")

    def _sizes(self, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
        return [(shape, self._engine.inputs[name].dtype) for name, shape in shapes.items()]
