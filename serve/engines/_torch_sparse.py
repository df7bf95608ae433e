"""2:4 weights of a PyTorch model in cuSPARSELt's kernels: which of them can, and how they get there.

A weight of nn.Linear is compressed, and every product with it is a sparse one from then on (_torch_sparse_linear.py).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pst.errors import EngineError
from pst.patterns import parse_pattern
from pst.progress import note
from serve.engines._torch_products import WIDTH_MULTIPLE, fits
from serve.engines._torch_sparse_linear import linear_class

PATTERN = "2:4"
WRONG_FORM = "it is no nn.Linear"
NOT_HELD = f"it does not hold {PATTERN}"
WRONG_SIZE = f"cuSPARSELt takes outputs and inputs in multiples of {WIDTH_MULTIPLE} alone"
NOT_CHOSEN = "it was not clearly faster sparse when it was tuned"


@dataclass(kw_only=True)
class SparseWeights:
    """What became of a model's prunable weights."""

    sparse: list[str] = field(default_factory=list)
    """Names of those that are compressed."""
    dense: dict[str, str] = field(default_factory=dict)
    """Why the others are not, by the weight's name."""


def candidates(weights: Sequence[Any]) -> tuple[list[Any], dict[str, str]]:
    """Of *weights* (pst.sparsify.PrunableWeight): those that hold 2:4, and why each other one cannot be compressed."""
    pattern, found, others = parse_pattern(PATTERN), [], {}
    for each in weights:
        if not hasattr(each.module, "in_features"):
            others[each.name] = WRONG_FORM
        elif not pattern.holds(each.weight.detach().float().cpu().numpy(), axis=each.axis):
            others[each.name] = NOT_HELD
        else:
            found.append(each)
    return found, others


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A weight that holds 2:4, as it is and compressed."""

    name: str
    module: Any
    dense: Any
    """(outputs, inputs), fp16."""
    sparse: Any
    """As cuSPARSELt packs it."""

    @property
    def bias(self) -> Any:
        """The layer's; None where it has none."""
        return self.module.bias


def compress(torch: Any, weights: Sequence[Any], *, where: str) -> tuple[list[Compressed], dict[str, str]]:
    """Compress those of *weights*, fp16 on a GPU, that hold 2:4 and have a size that cuSPARSELt takes.

    Also why each other one cannot be, by its name. Raises EngineError, naming *where*, without cuSPARSELt, and where no
    weight is compressed.
    """
    if not torch.backends.cusparselt.is_available():
        raise EngineError(
            "This PyTorch has no cuSPARSELt for this GPU, which 2:4 needs; install one built for CUDA 12 or newer on "
            "a GPU of compute capability 8.0 or higher, or choose the engine torch-cuda-fp16."
        )
    found, others = candidates(weights)
    result = []
    for each in found:
        dense = each.weight.detach().contiguous()
        if not fits(*dense.shape):
            others[each.name] = WRONG_SIZE
            continue
        try:
            sparse = torch._cslt_compress(dense)
        except RuntimeError as error:
            others[each.name] = str(error).strip().splitlines()[0].rstrip(".")
            continue
        result.append(Compressed(name=each.name, module=each.module, dense=dense, sparse=sparse))
    if not result:
        raise EngineError(
            f"No weight of {where} can run in 2:4 kernels ({_first(others)}); train it with --pattern 2:4, or choose "
            "the engine torch-cuda-fp16."
        )
    return result, others


def install_(torch: Any, found: Sequence[Compressed], others: Mapping[str, str]) -> SparseWeights:
    """Put each of *found* into its layer but those that *others* gives a reason to leave dense; says how many."""
    result = SparseWeights(dense=dict(others))
    for each in found:
        if each.name not in others:
            each.module.weight = torch.nn.Parameter(each.sparse, requires_grad=False)
            each.module.__class__ = linear_class(torch)
            result.sparse.append(each.name)
    rest = f"; {len(others)} stay dense ({_first(others)})" if others else ""
    count = len(result.sparse) + len(others)
    note(f"{len(result.sparse)} of {count} prunable weights run in cuSPARSELt's 2:4 kernels{rest}.")
    return result


def known_dense(found: Sequence[Compressed], chosen: Collection[str], *, where: str) -> dict[str, str]:
    """Why each of *found* that is not *chosen* stays dense. Raises EngineError where one of *chosen* is not found."""
    missing = sorted(set(chosen) - {each.name for each in found})
    if missing or not chosen:
        raise EngineError(
            f"{where} was tuned with other weights in 2:4 kernels ({', '.join(missing) or 'none'}); run pst bench "
            "--tune again."
        )
    return {each.name: NOT_CHOSEN for each in found if each.name not in chosen}


def _first(reasons: Mapping[str, str]) -> str:
    return next(f"{name}: {why}" for name, why in reasons.items())
