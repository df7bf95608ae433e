"""An inspection as text for a person."""

import io
import shutil
from typing import TYPE_CHECKING

from export.measure import WeightReport

if TYPE_CHECKING:
    from export.inspect import Inspection

_COLUMNS = ("weight", "shape", "type", "axis", "density", "zero rows", "zero columns", "patterns")
_LEFT = (0, 7)  # columns that are aligned on the left


def render(inspection: "Inspection", *, terminal: bool) -> str:
    """The table of weights and the totals; *terminal* chooses a rich table in the terminal's width."""
    rows = [_cells(row) for row in inspection.weights]
    table = _rich_table(rows) if terminal else _plain_table(rows)
    return "\n".join([_heading(inspection), "", table, "", *_totals(inspection)]) + "\n"


def _cells(row: WeightReport) -> tuple[str, ...]:
    return (
        row.name, " x ".join(str(size) for size in row.shape), row.dtype, str(row.axis), f"{row.density:.4f}",
        str(row.zero_rows), str(row.zero_columns), ", ".join(row.patterns) or "-",
    )  # fmt: skip


def _plain_table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [_COLUMNS, *rows]) for column in range(len(_COLUMNS))]
    lines = []
    for row in [_COLUMNS, *rows]:
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
    for column, title in enumerate(_COLUMNS):
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
    return lines


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10_000 else f"{count:,} bytes"
