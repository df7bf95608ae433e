"""What the scripts share: where a report lies, and tables for a terminal."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def report_path(name: str, machine: dict[str, Any], *, device: str = "auto", ending: str = "json") -> Path:
    """benchmarks/NAME_<device>_<yyyymm>.ENDING: the first GPU's short name, or cpu; *machine* as environment() says."""
    on_gpu = machine["gpus"] and device != "cpu"
    named = re.sub(r"^NVIDIA\s+", "", machine["gpus"][0]).split()[0] if on_gpu else "cpu"
    month = datetime.now(UTC).strftime("%Y%m")
    return Path(__file__).parent / f"{name}_{named.lower()}_{month}.{ending}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns as wide as their longest cell, the first *left* of them flush left and the others flush right."""
    every = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[at]) for row in every) for at in range(len(header))]
    lines = (
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    )
    return "\n".join(lines)
