"""2:4 weights of a PyTorch model in cuSPARSELt's kernels, through torch.sparse.to_sparse_semi_structured.

PyTorch compresses a weight of nn.Linear, and every product with it is a sparse one from then on. Which of cuSPARSELt's
algorithms is the fastest depends on the number of rows, so that each number gets its own search.
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
_PADDED = 8
"""Rows of the dense factor: cuSPARSELt takes multiples of 8 in fp16, and PyTorch fills up to those."""


@dataclass(kw_only=True)
class SparseWeights:
    """What became of a model's prunable weights."""

    torch: Any
    sparse: dict[str, Any] = field(default_factory=dict)
    """The modules whose weight is compressed, by the weight's name."""
    dense: dict[str, str] = field(default_factory=dict)
    """Why the others are not, by the weight's name."""
    _algorithms: dict[int, dict[str, int]] = field(default_factory=dict)

    def choose(self, rows: int) -> None:
        """Take for each weight the algorithm that is the fastest with *rows* rows (batch * tokens)."""
        if rows not in self._algorithms:
            padded = -(-rows // _PADDED) * _PADDED
            self._algorithms[rows] = {name: self._search(module, padded) for name, module in self.sparse.items()}
        for name, module in self.sparse.items():
            module.weight.alg_id_cusparselt = self._algorithms[rows][name]

    def _search(self, module: Any, rows: int) -> int:
        dense = self.torch.randn(rows, module.in_features, dtype=self.torch.float16, device=module.weight.device)
        found = self.torch._cslt_sparse_mm_search(module.weight.packed, dense.t(), bias=module.bias)
        return int(found)


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
    result = SparseWeights(torch=torch, dense=others)
    for each in found:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that its interface is a prototype
                sparse = torch.sparse.to_sparse_semi_structured(each.weight.detach().contiguous())
        except RuntimeError as error:  # of sizes that its kernels do not take
            result.dense[each.name] = str(error).strip().splitlines()[0].rstrip(".")
            continue
        each.module.weight = torch.nn.Parameter(sparse, requires_grad=False)
        result.sparse[each.name] = each.module
    reasons = [f"{name}: {why}" for name, why in result.dense.items()]
    if not result.sparse:
        raise EngineError(
            f"No weight of {where} can run in 2:4 kernels ({reasons[0]}); train it with --pattern 2:4, or choose the "
            "engine torch-cuda-fp16."
        )
    rest = f"; {len(reasons)} stay dense ({reasons[0]})" if reasons else ""
    note(f"{len(result.sparse)} of {len(weights)} prunable weights run in cuSPARSELt's 2:4 kernels{rest}.")
    return result
