"""The key/value cache of sequences that a language model continues together (export/cache.py has the graph's names).

    decoding = Decoding(engine, pad_id=0)
    logits = decoding.join([[5, 6, 7], [8]])       # (2, vocabulary): scores of the token after each prompt
    logits = decoding.step(logits.argmax(axis=-1))
    decoding.keep(np.array([True, False]))         # the second has ended
    logits = decoding.join([[9, 10]])              # (1, vocabulary): a new one, beside what goes on

Rows are padded on the left, so that all of them end at the same place. What stands at padding is masked, and positions
do not count it: a row's tokens do not depend on the others', but for rounding.

The cache stays where the engine has it (serve.engines.CachingEngine) as long as rows only go on; rows that come and go
pass through the host.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from pst.errors import ArtifactError
from serve.engines import LOGITS, PAST, PRESENT, Array, Cache, CachingEngine, Engine, TensorSpec, cache_inputs

REMEDY = "export the model again."


def has_cache(inputs: Mapping[str, TensorSpec]) -> bool:
    """Whether a graph with these *inputs* can be continued token by token."""
    return bool(cache_inputs(inputs)) and "position_ids" in inputs


def empty_cache(inputs: Mapping[str, TensorSpec], batch_size: int) -> dict[str, Array]:
    """A cache of no tokens for each of cache_inputs: (batch_size, heads, 0, width). Raises ArtifactError."""
    return {name: _empty(spec, batch_size) for name, spec in cache_inputs(inputs).items()}


def _empty(spec: TensorSpec, batch_size: int) -> Array:
    sizes = [size for size in spec.shape if isinstance(size, int)]
    if len(spec.shape) != 4 or len(sizes) != 2:
        raise ArtifactError(f"Input {spec.name} has the shape {spec.shape}, which no key/value cache has; {REMEDY}")
    return np.zeros((batch_size, sizes[0], 0, sizes[1]), dtype=spec.dtype)


class HostCache:
    """The cache of an engine that keeps none: arrays, given and taken with each inference. See serve.engines.Cache."""

    def __init__(self, engine: Engine, past: Mapping[str, Array]) -> None:
        self._engine, self._past = engine, dict(past)

    def extend(self, feeds: Mapping[str, Array]) -> Array:
        """See Cache."""
        outputs = self._engine.infer({**feeds, **self._past})
        self._past = {name: outputs[name.replace(PAST, PRESENT, 1)] for name in self._past}
        return outputs[LOGITS][:, -1]

    def copy(self) -> Self:
        """See Cache."""
        return type(self)(self._engine, self._past)  # arrays are shared, since none is ever written to

    def arrays(self) -> dict[str, Array]:
        """See Cache."""
        return dict(self._past)


def open_cache(engine: Engine, past: Mapping[str, Array]) -> Cache:
    """A cache of *past* (of empty_cache's form), on the engine's device where it keeps one."""
    return engine.cache(past) if isinstance(engine, CachingEngine) else HostCache(engine, past)


class Decoding:
    """Rows of a cache, which come and go between steps. Raises ArtifactError for a graph without a cache."""

    def __init__(self, engine: Engine, *, pad_id: int) -> None:
        if not has_cache(engine.inputs):
            raise ArtifactError(f"The graph has no key/value cache; {REMEDY}")
        self._engine, self._pad_id = engine, pad_id
        self._cache: Cache | None = None  # of no rows
        self._mask: Array = np.zeros((0, 0), dtype=np.int64)  # (rows, P), 0 for padding
        self._positions: Array = np.zeros(0, dtype=np.int64)  # (rows,) of the next token

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._mask)

    def copy(self) -> Self:
        """The same rows once more, with nothing copied."""
        other = type(self)(self._engine, pad_id=self._pad_id)
        other._cache = self._cache.copy() if self._cache else None
        other._mask, other._positions = self._mask, self._positions
        return other

    def join(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Add a row for each of *prompts*, one or more, none empty; the scores of what follows them, (prompts, V)."""
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, longest - len(prompt) :], mask[place, longest - len(prompt) :] = prompt, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        cache = open_cache(self._engine, empty_cache(self._engine.inputs, len(prompts)))
        logits = cache.extend({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        if self._cache is not None:
            length = max(self._mask.shape[1], longest)
            mask = np.concatenate([_left_padded(each, length, axis=1) for each in (self._mask, mask)])
            old, new = self._cache.arrays(), cache.arrays()
            cache = open_cache(
                self._engine,
                {
                    name: np.concatenate([_left_padded(each[name], length, axis=2) for each in (old, new)])
                    for name in new
                },
            )
        self._cache, self._mask = cache, mask
        self._positions = np.concatenate([self._positions, positions[:, -1] + 1])
        return logits

    def step(self, tokens: Array) -> Array:
        """Read one token of each row, (rows,) of whole numbers; the scores of what follows, (rows, V)."""
        assert self._cache is not None, "a decoding without rows has no next step"
        ids = tokens[:, None].astype(np.int64)
        mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        logits = self._cache.extend(
            {"input_ids": ids, "attention_mask": mask, "position_ids": self._positions[:, None]}
        )
        self._mask, self._positions = mask, self._positions + 1
        return logits

    def keep(self, rows: Array) -> None:
        """Drop all rows but those where *rows*, (rows,) of bool, is true, and what was padding for all that stay."""
        if rows.all():
            return
        mask = self._mask[rows]
        first = int(mask.any(axis=0).argmax()) if len(mask) else mask.shape[1]
        if self._cache is not None:
            kept = {name: cache[rows, :, first:] for name, cache in self._cache.arrays().items()}
            self._cache = open_cache(self._engine, kept) if len(mask) else None
        self._mask, self._positions = mask[:, first:], self._positions[rows]


def _left_padded(value: Array, length: int, *, axis: int) -> Array:
    """Zeros before *value*, so that it has *length* entries along *axis*."""
    shape = list(value.shape)
    shape[axis] = length - shape[axis]
    return np.concatenate([np.zeros(shape, dtype=value.dtype), value], axis=axis) if shape[axis] else value
