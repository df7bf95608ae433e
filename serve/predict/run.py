"""``predict``: time each of a model's linears dense and with zeros of a pattern, in turn with the whole dense model.

What a model's time is without its linears, sparsity leaves as it is (Amdahl's law). With T the time of the dense model,
D that of its linears dense and S that of them sparse, all of one round, the speed-up to expect is

    (R + D) / (R + S),    R = max(0, T - D)

per round, and its median and interval over the rounds are those of serve.bench.timing. Weights are random: the time of
a product depends on where zeros are allowed, not on values. The linears are timed by themselves, several of one shape
with different weights one after another, so that they do not stay in a cache that they would not stay in inside the
model. What this leaves out: what a runtime fuses into a product (bias, activation), which costs a sparse one the same;
and of a structured pattern, what attention and activations save with fewer heads and neurons, so that its prediction is
on the low side.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pst.errors import ArtifactError, ConfigError
from pst.files import resolve_model
from pst.patterns import check_sparsity, parse_pattern
from pst.patterns.structured import Structured
from pst.progress import progress
from serve.bench.environment import environment
from serve.bench.stopping import StopRule, relative_half_width
from serve.bench.timing import Speedup, compare_samples, percentile
from serve.bench.workload import Shape, check_shapes
from serve.describe import max_positions
from serve.engines import available_cpus
from serve.predict.linears import Linear, read_linears
from serve.predict.masks import random_mask
from serve.predict.products import SEED, Call, Product, Products, open_products, random_weights, rounds
from serve.predict.result import LayerPrediction, Prediction, ShapePrediction

CACHE_BYTES = 128 * 2**20
"""So many bytes of weights of one shape are kept, if the model has as many: more than most caches hold."""
MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """One linear, dense and sparse."""

    linear: Linear
    dense: Product
    sparse: Product
    is_sparse_kernel: bool
    copies: int

    @property
    def scale(self) -> float:
        """Layers in the model for each that is timed."""
        return self.linear.count / self.copies


def predict(
    path: Path,
    *,
    pattern: str,
    shapes: Sequence[Shape],
    sparsity: float | None = None,
    engine: str = "auto",
    threads: int = 0,
    precision: float = 0.02,
    budget_s: float = 60.0,
    command: str = "",
) -> Prediction:
    """The speed-up that the model at *path*, an artifact or a Hugging Face folder, can expect of *pattern*.

    *sparsity*: 0.5 where neither it nor the pattern says. *shapes*: batch x sequence. *precision* and *budget_s* as in
    serve.bench.runner.bench; *precision* is that of each predicted speed-up.
    Raises ConfigError, PatternError, ModelError, and EngineError where the runtime is missing or refuses.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path} is no folder; give an artifact folder or a Hugging Face model folder.")
    if not 0 < precision < 1 or budget_s <= 0:
        raise ConfigError("Give a --precision between 0 and 1, for example 0.02, and a --budget above 0 seconds.")
    wanted = parse_pattern(pattern)
    if sparsity is not None and wanted.sparsity is not None and sparsity != wanted.sparsity:
        raise ConfigError(f"Pattern {pattern} has sparsity {wanted.sparsity:g}; leave --sparsity out.")
    share = wanted.sparsity if wanted.sparsity is not None else 0.5 if sparsity is None else sparsity
    check_sparsity(share)
    structured = share if isinstance(wanted, Structured) else None
    linears = read_linears(path, structured=structured)
    check_shapes(shapes, {path.name: max_positions(resolve_model(path))})
    machine = environment(command=command, threads=threads or available_cpus())
    found = []
    with (
        open_products(path, engine=engine, threads=threads) as products,
        progress("measure shapes", len(shapes)) as advance,
    ):
        pairs = [_pair(linear, products, pattern=pattern, sparsity=share) for linear in linears]
        for index, shape in enumerate(shapes):
            found.append(
                _measure(products, pairs, shape, precision=precision, budget_s=budget_s / (len(shapes) - index))
            )
            budget_s = max(0.0, budget_s - found[-1].stopped.seconds)
            advance(1, found[-1].shape)
        return Prediction(
            environment=machine,
            path=str(path),
            pattern=pattern,
            sparsity=share,
            engine=products.name,
            dtype=products.dtype,
            shapes=tuple(found),
            why_none=products.why_none,
        )


def _pair(linear: Linear, products: Products, *, pattern: str, sparsity: float) -> _Pair:
    size = np.dtype(products.dtype).itemsize
    copies = min(linear.count, max(1, CACHE_BYTES // (linear.outputs * linear.inputs * size)))
    weights = random_weights(linear.outputs, linear.inputs, copies)
    dense = products.dense(weights)
    wanted = parse_pattern(pattern)
    if isinstance(wanted, Structured):
        smaller = random_weights(linear.left_outputs, linear.left_inputs, copies)
        return _Pair(linear=linear, dense=dense, sparse=products.dense(smaller), is_sparse_kernel=False, copies=copies)
    random = np.random.default_rng(SEED)
    weights = random_weights(linear.outputs, linear.inputs, copies)
    for weight in weights:
        weight *= random_mask(wanted, weight.shape, sparsity, random, name=linear.names[0])
    sparse = products.sparse(pattern, weights)
    return _Pair(
        linear=linear,
        dense=dense,
        sparse=sparse or products.dense(weights),
        is_sparse_kernel=sparse is not None,
        copies=copies,
    )


def _measure(
    products: Products, pairs: Sequence[_Pair], shape: Shape, *, precision: float, budget_s: float
) -> ShapePrediction:
    batch, sequence = shape
    calls: dict[str, Call] = {MODEL: products.model(batch, sequence)}
    for index, pair in enumerate(pairs):
        calls[f"dense {index}"] = pair.dense.at(batch * sequence)
        calls[f"sparse {index}"] = pair.sparse.at(batch * sequence)

    def width(samples: Mapping[str, Sequence[float]]) -> float | None:
        return relative_half_width(_speedup(samples, pairs))

    name = f"{batch}x{sequence}"
    rule = StopRule(runs=1, precision=precision, budget_s=budget_s, width=width)
    samples, seconds = rounds(calls, rule)
    layers = []
    for index, pair in enumerate(pairs):
        before, after = samples[f"dense {index}"], samples[f"sparse {index}"]
        layers.append(
            LayerPrediction(
                names=pair.linear.names,
                shape=pair.linear.shape,
                left=f"{pair.linear.left_outputs} x {pair.linear.left_inputs}",
                count=pair.linear.count,
                dense_ms=pair.scale * percentile(before, 50),
                sparse_ms=pair.scale * percentile(after, 50),
                speedup=compare_samples(before, after),
                kernel=pair.sparse.kernel,
                sparse_kernel=pair.is_sparse_kernel,
            )
        )
    slower = {index for index, layer in enumerate(layers) if layer.speedup.finding == "slower"}
    return ShapePrediction(
        shape=name,
        model_ms=percentile(samples[MODEL], 50),
        speedup=_speedup(samples, pairs),
        mixed=_speedup(samples, pairs, dense=slower) if slower else None,
        layers=tuple(layers),
        stopped=rule.stopped(samples, seconds=seconds),
    )


def _speedup(samples: Mapping[str, Sequence[float]], pairs: Sequence[_Pair], *, dense: Collection[int] = ()) -> Speedup:
    """(R + D) / (R + S) over the rounds; *dense*: the indices of pairs that stay dense."""
    before, after = [], []
    for number, whole in enumerate(samples[MODEL]):
        d = [pair.scale * samples[f"dense {index}"][number] for index, pair in enumerate(pairs)]
        s = [pair.scale * samples[f"sparse {index}"][number] for index, pair in enumerate(pairs)]
        rest = max(0.0, whole - sum(d))
        before.append(rest + sum(d))
        after.append(rest + sum(d[index] if index in dense else s[index] for index in range(len(pairs))))
    return compare_samples(before, after)
