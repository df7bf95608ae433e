"""The rows of benchmarks/train_step.py: one way to train the same random model each, as a step that can be timed.

dense                full fine-tuning
dense-recorded       the same, each step started as one CUDA graph (pst/graphs.py)
query                the query weights train, everything else is frozen
literal-PATTERN      the published PST as its equations stand (benchmarks/literal_pst.py)
pst-PATTERN          sparsify_ with PST's defaults, masks chosen anew by set_sparsity_ at every step and checked at the
                     next, and, on a GPU, the rest of the step recorded as one CUDA graph, as ``pst train`` does
taught-PATTERN       the same with its own start as the teacher, as pst/methods/pst.py has it for N:M
unrecorded-PATTERN   pst-PATTERN without the graph
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.literal_pst import replace_linears_
from pst.dropout import set_dropout_
from pst.graphs import RecordedSteps
from pst.methods.pst import PST, TAUGHT
from pst.objective import Objective
from pst.patterns import parse_pattern
from pst.pending import Delayed
from pst.sparsify import set_sparsity_, sparsify_
from pst.teacher import frozen, on_device

KINDS = ("dense", "dense-recorded", "query", "literal", "unrecorded", "pst", "taught")
SHAPES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    },
    "tiny": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99,
    },
}  # fmt: skip
"""What differs from BertConfig's defaults, which are BERT-base."""
BATCHES = 8
"""Different batches, one after the other and then from the first again."""
LITERAL_RANK = 8
LEARNING_RATE = 3e-5
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row of the table at one precision."""

    kind: str
    pattern: str | None
    """None where nothing is pruned."""
    sparsity: float
    precision: str

    @property
    def name(self) -> str:
        """``dense``, ``pst-2:4``."""
        return self.kind if self.pattern is None else f"{self.kind}-{self.pattern}"


def row_specs(kinds: Sequence[str], patterns: Sequence[str], sparsity: float, precision: str) -> list[RowSpec]:
    """Every row, in the order of the table; *sparsity* is for patterns that do not fix their own."""
    specs = []
    for kind in kinds:
        if kind in ("dense", "dense-recorded", "query"):
            specs.append(RowSpec(kind=kind, pattern=None, sparsity=0.0, precision=precision))
            continue
        for pattern in patterns:
            fixed = parse_pattern(pattern).sparsity
            if kind == "taught" and fixed is None:
                continue
            final = sparsity if fixed is None else fixed
            specs.append(RowSpec(kind=kind, pattern=pattern, sparsity=final, precision=precision))
    return specs


def random_bert(shape: str) -> nn.Module:
    """BertForSequenceClassification with random weights, two labels, on the processor."""
    torch.manual_seed(0)
    model: nn.Module = BertForSequenceClassification(BertConfig(num_labels=2, **SHAPES[shape]))
    return model


def random_batches(model: nn.Module, *, batch: int, length: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Random ids and labels, on *device*: every row has *length* tokens, so that the mask is all ones."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(getattr(model.config, "vocab_size"))  # noqa: B009 - a module's attributes are Tensors to mypy
    made = []
    for _ in range(BATCHES):
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        labels = torch.randint(2, (batch,), generator=generator)
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        made.append({name: value.to(device) for name, value in one.items()})
    return made


@dataclass(frozen=True, kw_only=True)
class Training:
    """One row's model, alive for as long as this is."""

    step: Callable[[], Tensor]
    """Train one step and return its loss, not synchronized."""
    trainable_parameters: int


def start(base: nn.Module, spec: RowSpec, batches: list[dict[str, Tensor]], device: torch.device) -> Training:
    """A copy of *base* on *device* with what *spec* trains, and its optimizer."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    objective = Objective()
    if spec.kind == "taught":
        set_dropout_(model, TAUGHT["dropout"])
        teacher = on_device(frozen(copy.deepcopy(base)), device, spec.precision)
        objective = Objective(teacher=teacher, weight=TAUGHT["distill_weight"], hidden=TAUGHT["distill_hidden"])
    groups, before = _trained(model, spec, device)
    model.to(device).train()
    if groups is None:
        groups = PST().param_groups(model)
    trainable = [parameter for one in groups for parameter in one["params"]]
    recorded = spec.kind in ("pst", "taught", "dense-recorded") and device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True, capturable=recorded)
    stream = itertools.cycle(batches)

    def train(batch: dict[str, Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = objective(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    run = RecordedSteps(train) if recorded else train

    def step() -> Tensor:
        before(model)
        return run(next(stream))

    return Training(step=step, trainable_parameters=sum(parameter.numel() for parameter in trainable))


def _trained(
    model: nn.Module, spec: RowSpec, device: torch.device
) -> tuple[list[dict[str, Any]] | None, Callable[[nn.Module], None]]:
    """Optimizer groups, None for the method's own, and what happens before each forward pass."""
    if spec.kind in ("pst", "taught", "unrecorded"):
        assert spec.pattern is not None
        sparsify_(model, method=PST(), pattern=spec.pattern)
        looks = Delayed(device)
        return None, lambda sparse: looks.add(set_sparsity_(sparse, spec.sparsity, wait=False).check)
    if spec.kind == "literal":
        assert spec.pattern is not None
        made = replace_linears_(model, rank=LITERAL_RANK, pattern=spec.pattern, sparsity=spec.sparsity)
        return [{"params": made}], lambda _: None
    if spec.kind == "query":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("attention.self.query.weight"))
    return [{"params": [one for one in model.parameters() if one.requires_grad]}], lambda _: None


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within: products of float32 in TF32, also beside bf16 autocast; for fp32 in float32 proper."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
