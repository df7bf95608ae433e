"""The report of a comparison: report.json (versioned), report.md, and a table for the terminal."""

import dataclasses
import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst.compare.grid import DENSE, percent
from pst.compare.results import CellResult, Row, by_seed, headline, make_row, number, verdict
from pst.config import START
from pst.errors import RunError
from pst.files import atomic_file, write_json
from pst.markdown import markdown_table

SCHEMA_VERSION = 1
PLOT_FILES = ("plot.png", "plot.svg")
REPORT_FILES = ("report.json", "report.md", *PLOT_FILES)
LOWER_IS_BETTER = {"loss", "mse", "perplexity"}
METHOD = (
    "All methods got the same model, data, steps, batch size and seeds. A value is the mean of its runs ± their sample "
    "standard deviation. The difference to dense is taken seed by seed, ± the standard error of its mean, and so is "
    "one method's lead over another. A lead counts as clear beyond two standard errors, which is a weak test for few "
    "seeds: of two methods that are equally good, chance alone makes one lead so in 30% of comparisons with 2 seeds, "
    "in 18% with 3, in 12% with 5 and in 8% with 10. Times are those of the steps alone, without evaluation "
    "and checkpoints. Peak memory is the highest of the runs: of a GPU its tensors, on a processor the whole "
    "process."
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a comparison found."""

    environment: dict[str, Any]
    options: dict[str, Any]
    metric: str
    higher_is_better: bool
    cells: tuple[CellResult, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    plots: tuple[str, ...] = ()
    """Names of the files that were drawn."""

    def verdicts(self) -> list[str]:
        """For each pattern and sparsity, which method did best, and whether its lead is more than noise."""
        shapes = dict.fromkeys((row.pattern, row.sparsity) for row in self.rows if row.method != DENSE)
        return [
            verdict(
                [row for row in self.rows if (row.pattern, row.sparsity) == shape],
                higher_is_better=self.higher_is_better,
            )
            for shape in shapes
        ]

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "options": self.options,
            "method": METHOD,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "cells": [_cell_json(result) for result in self.cells],
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "verdicts": self.verdicts(),
            "notes": list(self.notes),
            "plots": list(self.plots),
        }

    def write(self, folder: Path) -> None:
        """Write report.json and report.md into *folder*."""
        write_json(folder / "report.json", self.to_json())
        with atomic_file(folder / "report.md") as partial:
            partial.write_text(self.to_markdown(), encoding="utf-8")

    def to_markdown(self) -> str:
        """report.md: verdicts, table, plot, what was compared, and the machine."""
        lines = [f"# Comparison: {self.metric} on {self.options['data']}", ""]
        lines += [f"- {sentence}" for sentence in (*self.verdicts(), *self.notes)]
        lines += ["", *markdown_table(*_table(self)), ""]
        lines += [f"![{self.metric} against sparsity]({PLOT_FILES[0]})", ""] if self.plots else []
        lines += [METHOD, "", "## Options", ""]
        lines += [f"- {name}: {_shown(value)}" for name, value in self.options.items() if value not in ([], False)]
        lines += ["", "## Machine", "", *(f"- {name}: {value}" for name, value in _machine(self.environment)), ""]
        return "\n".join(lines)

    def render(self) -> str:
        """The table, verdicts and notes for a terminal, as wide as it is; colour only where stdout is one."""
        from rich.console import Console
        from rich.table import Table

        stream = io.StringIO()
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size((140, 24)).columns if terminal else 140
        console = Console(file=stream, width=width, force_terminal=terminal, highlight=False)
        table = Table()
        header, rows = _table(self)
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index < 2 else "right")
        for row, after in zip(rows, [*rows[1:], rows[-1]], strict=True):
            table.add_row(*row, end_section=row[1:3] != after[1:3])
        console.print(table)
        for sentence in (*self.verdicts(), *self.notes):
            console.print(sentence, markup=False, soft_wrap=not terminal)
        return stream.getvalue().rstrip("\n")


def make_report(
    results: Sequence[CellResult], *, environment: dict[str, Any], options: dict[str, Any], kept: int, of: int
) -> Report:
    """Put the cells of a grid of *of* cells together; *kept*: how many of them an earlier start had finished.

    Raises RunError where no cell came to its end.
    """
    finished = [result for result in results if result.error is None]
    failed = [result for result in results if result.error is not None]
    if not finished:
        raise RunError(f"Every run of the comparison failed; the first, {failed[0].cell.label}: {failed[0].error}")
    metric = headline(finished)
    groups: dict[tuple[str, str, float], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.cell.method, result.cell.pattern, result.cell.sparsity), []).append(result)
    dense = by_seed(groups.get((DENSE, DENSE, 0.0), []), metric)
    rows = tuple(make_row(group, metric, dense) for group in groups.values())
    return Report(
        environment=environment,
        options=options,
        metric=metric,
        higher_is_better=metric not in LOWER_IS_BETTER,
        cells=tuple(results),
        rows=rows,
        notes=tuple(_notes(finished, failed, options=options, jobs=environment["jobs"], kept=kept, of=of)),
    )


def _notes(
    finished: Sequence[CellResult],
    failed: Sequence[CellResult],
    *,
    options: dict[str, Any],
    jobs: int,
    kept: int,
    of: int,
) -> list[str]:
    notes = []
    if len(finished) + len(failed) < of:
        notes.append(
            f"This is what {len(finished)} of {of} runs came to; the same command goes on with the others, and the "
            "table is then another."
        )
    if options["from_dense"]:
        notes.append(
            f"The sparse runs start from the dense run of their seed, so they build on its {finished[0].steps} steps."
        )
    if options["teacher_from_dense"]:
        notes.append("The dense run of each seed was the teacher of its sparse runs.")
    own = dict.fromkeys(f"{result.cell.method} {result.cell.pattern}" for result in finished if result.teacher == START)
    if own:
        notes.append(f"Of these the dense start was the teacher, by their own defaults or as asked: {', '.join(own)}.")
    if jobs > 1:
        notes.append(f"{jobs} runs shared this machine at a time: a run alone is faster than the times say.")
    if kept:
        notes.append(f"{kept} runs were kept from an earlier start, whose machine and load the times may show.")
    if len({tuple(sorted(result.rows.items())) for result in finished}) > 1:
        notes.append("The data changed between the runs, so they cannot be compared: start again with --overwrite.")
    notes += [f"Failed: {result.cell.label}: {result.error}" for result in failed]
    return notes


def _value(row: Row) -> str:
    failed = f", {row.failed} failed" if row.failed else ""
    if row.value is None:
        return "failed"
    if row.value.std is None:
        return f"{number(row.value.mean)} (n = 1, no spread{failed})"
    return f"{number(row.value.mean)} ± {number(row.value.std)} (n = {row.value.n}{failed})"


def _difference(row: Row) -> str:
    if row.to_dense is None:
        return ""
    sign = "+" if row.to_dense.mean > 0 else ""
    error = "" if row.to_dense.error is None else f" ± {number(row.to_dense.error)}"
    return f"{sign}{number(row.to_dense.mean)}{error}"


def _parameters(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    better = "" if report.higher_is_better else " (lower is better)"
    header = ["method", "pattern", "sparsity", f"{report.metric}{better}", "to dense", "zeros"]
    header += ["ms/step", "peak GB", "trainable"]
    rows = [
        [
            row.method,
            "" if row.method == DENSE else row.pattern,
            "" if row.method == DENSE else percent(row.sparsity),
            _value(row),
            _difference(row),
            "" if row.measured_sparsity is None else f"{row.measured_sparsity:.1%}",
            "" if row.step_seconds is None else f"{row.step_seconds * 1e3:.1f}",
            "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e9:.2f}",
            _parameters(row.trainable_parameters),
        ]
        for row in _in_order(report.rows)
    ]
    return header, rows


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Dense, then the methods side by side at each pattern and sparsity."""
    shapes = list(dict.fromkeys((row.pattern, row.sparsity) for row in rows))
    return sorted(rows, key=lambda row: shapes.index((row.pattern, row.sparsity)))


def _cell_json(result: CellResult) -> dict[str, Any]:
    content = dataclasses.asdict(result)
    cell = content.pop("cell")
    config = cell.pop("config")
    return {"name": result.cell.name, **cell, **content, "config": config}


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _machine(environment: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Command", f"`{environment['command']}`" if environment["command"] else "called from Python"),
        ("Time", environment["time"]),
        ("CPU", f"{environment['cpu']}, {environment['cpus_usable']} CPUs usable, {environment['threads']} threads"),
        ("GPU", "; ".join(environment["gpus"]) or "none"),
        ("Runs at a time", str(environment["jobs"])),
        ("System", environment["os"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
        ("Revision", environment["git_revision"] or "unknown"),
    ]
