"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first two columns are words, and the rest numbers."""
    rule = ["---"] * 2 + ["---:"] * (len(header) - 2)
    every = [list(header), rule, *(list(row) for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in every]
