"""What is fed to the engines: random tokens of exactly a shape, or texts of a data set at their own lengths.

A language model has two workloads of each shape: the prompt, and the tokens after it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pst.errors import ConfigError
from serve.decoding import empty_cache
from serve.engines import Array, TensorSpec, cache_inputs
from serve.text import INPUTS, TextEncoder, select_inputs

Shape = tuple[int, int]
FALLBACK_VOCABULARY = 2
"""Token ids stay below this where no config.json tells the vocabulary's size: every model has two."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One row of the report: rows per inference, tokens per row, and the inputs, taken in turn round after round."""

    name: str
    batch: int
    sequence: int | None
    """Tokens per row after padding; None where every inference has its own."""
    feeds: tuple[dict[str, Array], ...]
    """Every input that some engine may ask for, but for a cache; each (batch, tokens) int64."""
    new_tokens: int = 0
    """Tokens that are generated after these, a prompt that is then read before the clock starts; 0 for none."""

    def select(self, round_index: int, names: Iterable[str]) -> dict[str, Array]:
        """The inputs called *names* of one round: the same text for every engine of that round."""
        return select_inputs(self.feeds[round_index % len(self.feeds)], names)

    def feeds_of(self, round_index: int, inputs: Mapping[str, TensorSpec]) -> dict[str, Array]:
        """select, and an empty cache where *inputs* want one."""
        cache = cache_inputs(inputs)
        return self.select(round_index, [name for name in inputs if name not in cache]) | empty_cache(
            inputs, self.batch
        )


def parse_shapes(text: str) -> list[Shape]:
    """``"1x32,8x128"`` as [(1, 32), (8, 128)]: batch x sequence. Raises ConfigError."""
    shapes: list[Shape] = []
    for part in text.split(","):
        batch, cross, sequence = part.strip().lower().replace("×", "x").partition("x")
        if not (cross and batch.isascii() and sequence.isascii() and batch.isdigit() and sequence.isdigit()):
            raise ConfigError(f"{part.strip()!r} is not a shape; write batch x sequence, for example 1x32,8x128.")
        if int(batch) < 1 or int(sequence) < 1:
            raise ConfigError(f"The shape {part.strip()} is empty; batch and sequence start at 1.")
        if (int(batch), int(sequence)) not in shapes:
            shapes.append((int(batch), int(sequence)))
    return shapes


def random_workload(shape: Shape, *, vocab_size: int | None, seed: int = 0) -> Workload:
    """Uniformly drawn token ids without padding. A dense transformer takes the same time for any of them."""
    batch, sequence = shape
    ids = np.random.default_rng(seed).integers(0, vocab_size or FALLBACK_VOCABULARY, shape, dtype=np.int64)
    positions = np.broadcast_to(np.arange(sequence, dtype=np.int64), shape).copy()
    values = (ids, np.ones_like(ids), np.zeros_like(ids), positions)
    return Workload(
        name=f"{batch}x{sequence}", batch=batch, sequence=sequence, feeds=(dict(zip(INPUTS, values, strict=True)),)
    )


def generation_workloads(shape: Shape, *, vocab_size: int | None, new_tokens: int) -> tuple[Workload, Workload]:
    """A prompt of random tokens up to the first new one, and *new_tokens* more with its cache."""
    prompt = random_workload(shape, vocab_size=vocab_size)
    return (
        replace(prompt, name=f"{prompt.name} prompt"),
        replace(prompt, name=f"{prompt.name} +{new_tokens} tokens", new_tokens=new_tokens),
    )


def text_workload(
    encoder: TextEncoder, first: Sequence[str], second: Sequence[str] | None, *, limit: int = 64, seed: int = 0
) -> Workload:
    """Up to *limit* texts of a data set, one per inference at its own length, in a fixed random order."""
    order = np.random.default_rng(seed).permutation(len(first))[:limit]
    rows = encoder.tokenize([first[i] for i in order], None if second is None else [second[i] for i in order])
    feeds = tuple(encoder.collate([row], names=INPUTS) for row in rows)
    return Workload(name="1 x text", batch=1, sequence=None, feeds=feeds)


def check_shapes(shapes: Sequence[Shape], limits: Mapping[str, int | None], *, new_tokens: int = 0) -> None:
    """Raise ConfigError for a shape that is longer than one of the models; *limits* holds tokens by artifact name.

    *new_tokens* more have to fit as well.
    """
    more = f" with {new_tokens} new tokens" if new_tokens else ""
    for batch, sequence in shapes:
        for name, limit in limits.items():
            if limit is not None and sequence + new_tokens > limit:
                raise ConfigError(
                    f"The shape {batch}x{sequence}{more} is longer than {name} can read ({limit} tokens); "
                    f"give --shapes with a sequence of {max(0, limit - new_tokens)} or less."
                )
