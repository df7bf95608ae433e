"""Proof that an ONNX graph holds the weights that were trained, and that the pattern holds where it counts.

"Where it counts" is along the reduction axis of the tensor that a matrix product reads, found in the graph itself:
2:4 along the other axis looks just as sparse and runs on no sparse tensor core.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export.graph import GraphWeight, as_matrix, find_weights
from export.manifest import WeightInfo
from export.passes.name_weights import same_bits
from pst.errors import ArtifactError
from pst.patterns import parse_pattern

Array = np.ndarray[Any, Any]
_DENSITY_TOLERANCE = 5e-4  # of the density that sparsity.json states, which may be rounded to three digits


def verify_claims(weights: Mapping[str, Array], claims: Sequence[Mapping[str, Any]], *, pattern: str) -> None:
    """Check what sparsity.json says against the PyTorch weights, before any time is spent on tracing.

    For each of *claims* (name, shape, axis, density, and pattern where weights have different ones): the weight of that
    name has that shape and density, and its pattern, or else *pattern*, holds along that axis. ``dense`` claims nothing
    about zeros.
    Raises ArtifactError for the first that fails, PatternError for a pattern that no one knows.
    """
    for claim in claims:
        spec = str(claim.get("pattern", pattern))
        rule = None if spec == "dense" else parse_pattern(spec)
        name, axis = str(claim["name"]), int(claim["axis"])
        trained = weights.get(name)
        if trained is None:
            raise ArtifactError(f"sparsity.json lists {name}, which the model does not have; train again.")
        if list(trained.shape) != list(claim["shape"]) or axis not in range(trained.ndim):
            raise ArtifactError(
                f"sparsity.json says that {name} is {list(claim['shape'])} with reduction axis {axis}; "
                f"the model has {list(trained.shape)}. Train again."
            )
        density = int(np.count_nonzero(trained)) / trained.size
        if abs(density - float(claim["density"])) > _DENSITY_TOLERANCE:
            raise ArtifactError(
                f"sparsity.json says that {name} has density {float(claim['density']):.4f}; it is {density:.4f}. "
                "The weights were changed after training; train again."
            )
        if rule is not None and not rule.holds(trained, axis=axis):
            raise _does_not_hold(spec, name, axis, trained.shape)


def verify_graph(
    model: Any, weights: Mapping[str, Array], claims: Sequence[Mapping[str, Any]], *, pattern: str
) -> tuple[WeightInfo, ...]:
    """Check each weight that sparsity.json lists against the graph; return them as the graph stores them.

    For each of *claims*, which verify_claims accepted: the graph multiplies with a tensor that equals the PyTorch
    weight bit for bit once their reduction axes are aligned, so that zeros are the same in number and place; and
    its pattern holds along the axis that the graph sums over. Raises ArtifactError for the first that fails.
    """
    graph, infos = find_weights(model), []
    for claim in claims:
        name, spec = str(claim["name"]), str(claim.get("pattern", pattern))
        weight, values = _find(name, weights[name], int(claim["axis"]), graph)
        matrix, axis = as_matrix(values, weight.axis)
        if spec != "dense" and not parse_pattern(spec).holds(matrix, axis=axis):
            raise _does_not_hold(spec, name, weight.axis, weight.shape)
        infos.append(_info(name, weight, values, pattern=spec))
    return tuple(infos)


def _does_not_hold(pattern: str, name: str, axis: int, shape: Sequence[int]) -> ArtifactError:
    return ArtifactError(
        f"Pattern {pattern} does not hold in {name} along its reduction axis (axis {axis} of {list(shape)}); nothing "
        f"was written. Train with --pattern {pattern}, or correct sparsity.json."
    )


def weights_as_found(model: Any, weights: Mapping[str, Array]) -> tuple[WeightInfo, ...]:
    """For a model without a sparsity report: each matrix product's weight that is a PyTorch parameter, as it is."""
    found = []
    for weight in find_weights(model):
        if weight.name in weights:
            values = weight.values()
            found.append(_info(weight.name, weight, values))
    return tuple(found)


def measured_sparsity(weights: Sequence[WeightInfo]) -> float:
    """Fraction of zeros over all of *weights* together; 0 for none."""
    sizes = np.array([np.prod(weight.shape, dtype=np.int64) for weight in weights], dtype=np.float64)
    densities = np.array([weight.density for weight in weights], dtype=np.float64)
    return float(1.0 - (sizes @ densities) / sizes.sum()) if len(weights) else 0.0


def _info(name: str, weight: GraphWeight, values: Array, *, pattern: str = "dense") -> WeightInfo:
    return WeightInfo(
        name=name, initializer=weight.name, form=weight.op, shape=weight.shape, axis=weight.axis,
        density=int(np.count_nonzero(values)) / values.size, pattern=pattern,
    )  # fmt: skip


def _find(name: str, trained: Array, axis: int, graph: Sequence[GraphWeight]) -> tuple[GraphWeight, Array]:
    """The tensor of *graph* that is *trained*: by name, else, for one that equal weights share, by value."""
    wanted = np.moveaxis(trained, axis, 0)
    named = [weight for weight in graph if weight.name == name]
    for weight in named or [weight for weight in graph if np.prod(weight.shape) == trained.size]:
        matrix, along = weight.matrix()
        if same_bits(np.moveaxis(matrix, along, 0), wanted):
            return weight, weight.values()
    if named:
        zeros = int(named[0].values().size - np.count_nonzero(named[0].values()))
        raise ArtifactError(
            f"{name} in the ONNX graph is not the trained weight, reduction axis {axis}: {zeros} zeros against "
            f"{int(trained.size - np.count_nonzero(trained))}, or other values. Nothing was written; this is a defect "
            "of the exporter, or sparsity.json states the wrong axis."
        )
    raise ArtifactError(
        f"No matrix product of the ONNX graph multiplies with {name}, reduction axis {axis}. Nothing was written; this "
        "is a defect of the exporter, or the weight is not used."
    )
