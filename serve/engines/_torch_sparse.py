"""2:4 weights of a PyTorch model in cuSPARSELt's kernels, through torch.sparse.to_sparse_semi_structured.

PyTorch compresses a weight of nn.Linear, and every product with it is a sparse one from then on, by cuSPARSELt's
default algorithm. Its tensors have no place for all that a search finds, such as how inputs are split among blocks;
pst predict searches, and says what a product would take.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pst.errors import EngineError
from pst.patterns import parse_pattern
from pst.progress import note

PATTERN = "2:4"
WRONG_FORM = "it is no nn.Linear"
NOT_HELD = f"it does not hold {PATTERN}"


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


def compress_(torch: Any, weights: Sequence[Any], *, where: str) -> SparseWeights:
    """Compress those of *weights*, fp16 on a GPU, that hold 2:4 and have a size that cuSPARSELt takes; says how many.

    Raises EngineError, naming *where*, without cuSPARSELt, and where no weight is compressed.
    """
    if not torch.backends.cusparselt.is_available():
        raise EngineError(
            "This PyTorch has no cuSPARSELt for this GPU, which 2:4 needs; install one built for CUDA 12 or newer on "
            "a GPU of compute capability 8.0 or higher, or choose the engine torch-cuda-fp16."
        )
    found, others = candidates(weights)
    result = SparseWeights(dense=others)
    for each in found:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that its interface is a prototype
                sparse = torch.sparse.to_sparse_semi_structured(each.weight.detach().contiguous())
        except RuntimeError as error:  # of sizes that its kernels do not take
            result.dense[each.name] = str(error).strip().splitlines()[0].rstrip(".")
            continue
        each.module.weight = torch.nn.Parameter(sparse, requires_grad=False)
        result.sparse.append(each.name)
    reasons = [f"{name}: {why}" for name, why in result.dense.items()]
    if not result.sparse:
        raise EngineError(
            f"No weight of {where} can run in 2:4 kernels ({reasons[0]}); train it with --pattern 2:4, or choose the "
            "engine torch-cuda-fp16."
        )
    rest = f"; {len(reasons)} stay dense ({reasons[0]})" if reasons else ""
    note(f"{len(result.sparse)} of {len(weights)} prunable weights run in cuSPARSELt's 2:4 kernels{rest}.")
    return result
