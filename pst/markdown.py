"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 2) -> list[str]:
    """The lines of a table whose first *left* columns are words, and the rest numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    every = [list(header), rule, *(list(row) for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in every]
