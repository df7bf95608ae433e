"""An inspection as text for a person."""

import io
import shutil
from typing import TYPE_CHECKING, Any

from export.measure import WeightReport

if TYPE_CHECKING:
    from export.inspect import Inspection

_COLUMNS = ("weight", "shape", "type", "form", "axis", "density", "zero rows", "zero columns", "patterns", "stated")
"""The last one only where weights are said to have different patterns."""
_LEFT = (0, 3, 8, 9)  # columns that are aligned on the left


def render(inspection: "Inspection", *, terminal: bool) -> str:
    """The table of weights and the totals; *terminal* chooses a rich table in the terminal's width."""
    rows = [_cells(row) for row in inspection.weights]
    if len({row.stated for row in inspection.weights} - {None}) > 1:  # a plan
        rows = [(*cells, row.stated or "-") for cells, row in zip(rows, inspection.weights, strict=True)]
    table = _rich_table(rows) if terminal else _plain_table(rows)
    return "\n".join([_heading(inspection), "", table, "", *_totals(inspection)]) + "\n"


def _cells(row: WeightReport) -> tuple[str, ...]:
    return (
        row.name, " x ".join(str(size) for size in row.shape), row.dtype, row.form, str(row.axis), f"{row.density:.4f}",
        str(row.zero_rows), str(row.zero_columns), ", ".join(row.patterns) or "-",
    )  # fmt: skip


def _plain_table(rows: list[tuple[str, ...]]) -> str:
    table = [_COLUMNS[: len(rows[0])] if rows else _COLUMNS[:-1], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _rich_table(rows: list[tuple[str, ...]]) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, title in enumerate(_COLUMNS[: len(rows[0])] if rows else _COLUMNS[:-1]):
        table.add_column(title, justify="left" if column in _LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=io.StringIO(), force_terminal=True, width=shutil.get_terminal_size((120, 24)).columns)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _heading(inspection: "Inspection") -> str:
    kind = f"{inspection.kind}, {inspection.model_type}" if inspection.model_type else inspection.kind
    return f"{inspection.path} ({kind})"


def _totals(inspection: "Inspection") -> list[str]:
    totals = inspection.totals
    lines = [
        f"Parameters        {totals.parameters:,} of which {totals.zeros:,} are zero (density {totals.density:.4f})",
        f"Prunable weights  {totals.prunable_parameters:,} of which {totals.prunable_zeros:,} are zero "
        f"(density {totals.prunable_density:.4f})",
        f"Size dense        {_size(totals.dense_bytes)}",
        f"  as bitmask + values  {_size(totals.bitmask_bytes)}",
    ]
    if totals.two_four_bytes is not None:
        lines.append(f"  as 2:4 + indices     {_size(totals.two_four_bytes)}")
    lines.append(f"  as values + int64    {_size(totals.sparse_bytes)}  (pst export --storage sparse)")
    lines.append(f"  through zstd         {_size(totals.zstd_bytes)}")
    return lines + _removal(inspection.structured)


def _removal(report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return []
    dense, lines = report["dense"], ["", "Heads and neurons were removed; of each layer is left:"]
    lines += [
        f"  layer {index:<3} {len(layer['heads']):>3} of {dense['heads']} heads {layer['neurons']:>6} of "
        f"{dense['neurons']} neurons"
        for index, layer in enumerate(report["layers"])
    ]
    for name, words in (("macs", f"Multiply-adds, {report['length']} tokens"), ("parameters", "Parameters of layers")):
        kept, whole = report[name]["kept"], report[name]["dense"]
        lines.append(f"{words:<26} {kept:,} of {whole:,} ({kept / whole:.2%})")
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10_000 else f"{count:,} bytes"
