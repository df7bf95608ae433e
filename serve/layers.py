"""Which layers of a model run sparse and which dense: the choice from their times, by shape of the layer.

Layers of one shape (outputs x inputs) run the same product, so that they are timed and chosen together.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.bench.timing import Speedup, compare_samples, percentile

Samples = Mapping[str, Sequence[float]]
"""Milliseconds by announced shape, such as 8x128; those of one place were measured in one round."""


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """The products of all layers of one shape, one after another, dense and sparse."""

    outputs: int
    inputs: int
    weights: tuple[str, ...]
    """Names of the layers' weights."""
    dense: Samples
    sparse: Samples

    @property
    def shape(self) -> str:
        """3072 x 768: outputs x inputs, as PyTorch stores a Linear."""
        return f"{self.outputs} x {self.inputs}"

    @property
    def speedup(self) -> Speedup:
        """Dense over sparse, of the time that one inference of each announced shape takes together."""
        return compare_samples(_totals(self.dense), _totals(self.sparse))

    @property
    def is_sparse(self) -> bool:
        """Whether the whole interval of the speed-up lies above 1 + EQUAL_WITHIN (serve.bench.timing)."""
        return self.speedup.finding == "faster"

    def to_json(self) -> dict[str, Any]:
        """The choice and medians in ms, as plain JSON values."""
        return {
            "outputs": self.outputs,
            "inputs": self.inputs,
            "weights": list(self.weights),
            "is_sparse": self.is_sparse,
            "speedup": self.speedup.to_json(),
            "dense_ms": {name: percentile(samples, 50) for name, samples in self.dense.items()},
            "sparse_ms": {name: percentile(samples, 50) for name, samples in self.sparse.items()},
        }


def _totals(samples: Samples) -> list[float]:
    return [sum(together) for together in zip(*samples.values(), strict=True)]


def dense_weights(layers: Iterable[LayerTimes]) -> dict[str, str]:
    """By name, why each weight that is not faster sparse stays dense; no full stop."""
    return {
        name: f"its products of {each.shape} are {each.speedup.ratio:.2f}× as fast sparse, which is not clearly faster"
        for each in layers
        if not each.is_sparse
        for name in each.weights
    }


def describe_layers(layers: Iterable[LayerTimes]) -> str:
    """For people: 3072 x 768 sparse (1.31×), 768 x 768 dense (0.93×)."""
    words = [f"{each.shape} {'sparse' if each.is_sparse else 'dense'} ({each.speedup.ratio:.2f}×)" for each in layers]
    return ", ".join(words)


def describe_choices(name: str, openings: Sequence[Sequence[LayerTimes]]) -> str:
    """A sentence on the layers of *name*, which were timed at each of *openings*: what was chosen, and how steadily."""
    first, count = openings[0], len(openings)
    if count == 1:
        return f"Layers of {name}: {describe_layers(first)}."
    choices = Counter(tuple(each.is_sparse for each in layers) for layers in openings)
    if len(choices) == 1:
        words = [f"{each.shape} {'sparse' if each.is_sparse else 'dense'}" for each in first]
        return (
            f"Layers of {name} were timed at each of {count} openings, always with the same choice: {', '.join(words)}."
        )
    sparse = [sum(layers[place].is_sparse for layers in openings) for place in range(len(first))]
    words = [f"{each.shape} sparse in {often}" for each, often in zip(first, sparse, strict=True)]
    return (
        f"Layers of {name} were timed at each of {count} openings, and the choice differed: {', '.join(words)}. Of "
        f"{len(choices)} choices the most frequent was made {max(choices.values())} times; the ratios are those of all."
    )
