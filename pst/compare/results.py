"""What became of the cells: a row for all seeds of a method, pattern and sparsity, and what may be said of rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pst import metrics
from pst.compare.grid import DENSE, Cell, percent
from pst.compare.statistics import Difference, Summary, paired, summarize


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What became of a cell: its numbers, or why it failed."""

    cell: Cell
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured_sparsity: float = 0.0
    """Zeros over all entries of the prunable weights, counted in the saved model."""
    train_seconds: float = 0.0
    """Of the steps alone, without evaluation and checkpoints."""
    steps: int = 0
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    task: str = ""
    teacher: str = ""
    """What taught it: a folder or hub id, ``start``, or nothing."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the training and validation rows."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """All seeds of one method, pattern and sparsity."""

    method: str
    pattern: str
    sparsity: float
    value: Summary | None
    """The headline metric; None where every seed failed."""
    by_seed: dict[int, float]
    failed: int
    to_dense: Difference | None
    """None for dense itself, and where no seed has both."""
    measured_sparsity: float | None
    step_seconds: float | None
    peak_memory_bytes: int | None
    trainable_parameters: int | None


def headline(finished: Sequence[CellResult]) -> str:
    """The metric that the data is known for, where all runs have it; else the first that they have."""
    first = finished[0]
    labels = 2 if "f1" in first.metrics else 3  # f1 is there for two labels alone
    name = metrics.for_data(first.cell.config.data, first.task, labels)
    return name if all(name in result.metrics for result in finished) else next(iter(first.metrics))


def by_seed(group: Sequence[CellResult], metric: str) -> dict[int, float]:
    return {result.cell.seed: result.metrics[metric] for result in group if result.error is None}


def make_row(group: Sequence[CellResult], metric: str, dense: Mapping[int, float]) -> Row:
    cell = group[0].cell
    finished = [result for result in group if result.error is None]
    values = by_seed(group, metric)
    pace = summarize([result.train_seconds / max(result.steps, 1) for result in finished])
    zeros = summarize([result.measured_sparsity for result in finished])
    return Row(
        method=cell.method,
        pattern=cell.pattern,
        sparsity=cell.sparsity,
        value=summarize(list(values.values())),
        by_seed=values,
        failed=len(group) - len(finished),
        to_dense=None if cell.method == DENSE else paired(values, dense),
        measured_sparsity=zeros.mean if zeros else None,
        step_seconds=pace.mean if pace else None,
        peak_memory_bytes=max((result.peak_memory_bytes or 0 for result in finished), default=0) or None,
        trainable_parameters=max((result.trainable_parameters or 0 for result in finished), default=0) or None,
    )


def verdict(rows: Sequence[Row], *, higher_is_better: bool) -> str:
    """What may be said about the methods at one pattern and sparsity."""
    where = f"{rows[0].pattern}, {percent(rows[0].sparsity)}"
    ranked = sorted(
        (row for row in rows if row.value is not None),
        key=lambda row: row.value.mean if row.value else 0.0,
        reverse=higher_is_better,
    )
    if not ranked:
        return f"{where}: every run failed."
    best = ranked[0]
    assert best.value is not None
    if len(ranked) == 1:
        return f"{where}: {best.method} alone has a result, {number(best.value.mean)}."
    second = ranked[1]
    lead = paired(best.by_seed, second.by_seed)
    text = f"{where}: {best.method} is best with {number(best.value.mean)}, "
    if lead is None:
        return f"{text}but has no seed in common with {second.method}, the next: nothing can be said of the lead."
    if second.value == best.value and lead.mean == 0:
        return f"{where}: {best.method} and {second.method} are equal with {number(best.value.mean)}."
    ahead = lead if higher_is_better else dataclasses.replace(lead, mean=-lead.mean)
    text += f"{number(ahead.mean)}"
    if ahead.error is None:
        return f"{text} ahead of {second.method}; one seed shows no spread, so this can be noise."
    text += f" ± {number(ahead.error)} ahead of {second.method} ({ahead.n} seeds)"
    if ahead.clear and ahead.mean > 0:
        return f"{text}: more than two standard errors."
    return f"{text}: within two standard errors, so not told apart from noise."


def number(value: float) -> str:
    """Fractions with four decimals, what lies beyond 1 (BLEU, perplexity) with two."""
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
