"""Why the zeros of a candidate save no time: what the receipt says of its layers, or what is known of the runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.bench.receipt import Receipt, receipts
from serve.bench.report import ZEROS
from serve.bench.runner import manifests_of
from serve.bench.workload import Workload
from serve.engines import Engine
from serve.tune.candidates import Candidate

MOST_WHYS = 3
TORCH = "PyTorch's dense kernels multiply zeros like any other number"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Of one candidate that is sparse in place."""

    why: str
    """What became of its zeros; no full stop."""
    sparse_kernels: int | None
    """Weights that ran in one; None where the runtime does not tell."""


def reasons(
    found: Sequence[Candidate], engines: Mapping[str, Engine], workloads: Sequence[Workload], *, profile: bool
) -> dict[tuple[str, str], Reason]:
    """By candidate and workload, of the candidates in *engines* that have zeros. *profile*: make receipts."""
    told: dict[tuple[str, str], Reason] = {}
    for candidate in found:
        if candidate.has_zeros and candidate.name in engines:
            for workload in workloads:
                told[candidate.name, workload.name] = _without_receipt(candidate, engines[candidate.name])
    sparse = [each for each in found if each.name in engines and each.has_zeros]
    for engine in dict.fromkeys(each.engine for each in sparse) if profile else ():
        manifests = manifests_of({each.name: each.path for each in sparse if each.engine == engine})
        for receipt in receipts({name: engines[name] for name in manifests}, manifests, workloads):
            told[receipt.artifact, receipt.workload] = _of_receipt(receipt)
    return told


def _of_receipt(receipt: Receipt) -> Reason:
    sparse = [layer for layer in receipt.layers if layer.is_sparse]
    ran = sum(layer.sparse_kernel for layer in sparse)
    whys = dict.fromkeys(layer.why for layer in sparse if not layer.sparse_kernel)
    counted = [f"{ran} of {len(sparse)} sparse weights ran in a sparse kernel"] if ran else []
    known = any(layer.eligible is not None or layer.sparse_kernel for layer in sparse)
    return Reason(why="; ".join([*counted, *list(whys)[:MOST_WHYS]]), sparse_kernels=ran if known else None)


def _without_receipt(candidate: Candidate, engine: Engine) -> Reason:
    family = candidate.engine.partition("-")[0]
    if family == "torch":
        compressed: frozenset[str] = getattr(engine, "sparse_weights", frozenset())
        if not compressed:
            return Reason(why=TORCH, sparse_kernels=0)
        dense = getattr(engine, "dense_weights", {})
        whys = [f"{len(compressed)} weights run in 2:4 kernels, {len(dense)} do not", *dict.fromkeys(dense.values())]
        return Reason(why="; ".join(whys), sparse_kernels=len(compressed))
    skipped: frozenset[str] = getattr(engine, "sparse_weights", frozenset())
    if family == "onnxruntime" and skipped:
        return Reason(why=f"the zeros of {len(skipped)} weights are skipped", sparse_kernels=len(skipped))
    if family == "onnxruntime" and engine.name.endswith(("cpu", "cuda")):
        device = "CUDA" if engine.name.endswith("cuda") else "CPU"
        return Reason(why=ZEROS.format(device=device), sparse_kernels=0)
    return Reason(why="the runtime does not tell which of its kernels ran", sparse_kernels=None)
