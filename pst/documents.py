"""Plain text as documents, for language models.

    FILE      .txt, or a table (pst/tables.py) with a text column
    FOLDER    train.txt and validation.txt (or valid, val, dev, test), or tables so named
    hub id    a data set with a text column

A row of a table is a document. In a text file, blank lines part documents. Where no validation rows are given,
documents are split off as in pst/data.py. ``limit`` keeps so many documents of each, evenly spaced.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pst.data import in_validation
from pst.errors import DataError
from pst.tables import VALIDATION_NAMES, Table, listed, local, read_file, read_splits

COLUMNS = ("text", "content", "document", "article", "sentence", "story")
"""Usual names of the text column."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts that have nothing to do with each other."""

    texts: list[str]
    source: str

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all texts, as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()


class TextSource(Protocol):
    """The fields of pst.data.DataSpec, which pst.config.TrainConfig has too, that say where text is."""

    @property
    def data(self) -> str: ...
    @property
    def text_columns(self) -> tuple[str, ...]: ...
    @property
    def validation(self) -> str: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def limit(self) -> int: ...


def load(config: TextSource, *, split: str) -> Documents:
    """The documents of *split* ("train" or "validation"). Raises DataError where they are not usable."""
    tables, cut = _text_splits(config) or read_splits(config.data, config.validation, {split})
    table = tables["train" if cut else split]
    texts = _texts(table, _column(table, config))
    total = len(texts)
    if cut:
        fraction = config.validation_fraction
        texts = [text for text in texts if in_validation(text, fraction) == (split == "validation")]
        if not texts:
            raise DataError(
                f"{table.where} has too few documents ({total}) for a {split} split with validation_fraction "
                f"{fraction}; give a file of its own with --set validation=FILE."
            )
    texts = _spread(texts, config.limit)
    return Documents(texts=texts, source=f"{config.data}, {split} split, {len(texts)} of {total} documents")


def load_whole(config: TextSource) -> Documents:
    """The documents to evaluate on: all of a FILE, the validation documents of a FOLDER or a hub id."""
    path = local(config.data)
    if path is None or not path.is_file():
        return load(config, split="validation")
    table = read_text(path) if path.suffix == ".txt" else read_file(path)
    texts = _texts(table, _column(table, config))
    kept = _spread(texts, config.limit)
    return Documents(texts=kept, source=f"{config.data}, whole, {len(kept)} of {len(texts)} documents")


def _spread(texts: list[str], limit: int) -> list[str]:
    """*limit* of them, evenly spaced; all for 0."""
    return [texts[i * len(texts) // limit] for i in range(limit)] if 0 < limit < len(texts) else texts


def _text_splits(config: TextSource) -> tuple[dict[str, Table], bool] | None:
    """The text files of ``config.data`` as tables with one column, and whether none is for validation; see read_splits.

    None where ``config.data`` has no text file to train on.
    """
    path = Path(config.data).expanduser()
    file = path / "train.txt" if path.is_dir() else path
    if file.suffix != ".txt" or not file.is_file():
        return None
    named = [path / f"{name}.txt" for name in VALIDATION_NAMES] if path.is_dir() else []
    other = Path(config.validation).expanduser() if config.validation else next(filter(Path.is_file, named), None)
    files = {"train": file} | ({"validation": other} if other else {})
    return {name: read_text(one) for name, one in files.items()}, other is None


def read_text(path: Path) -> Table:
    """The documents of a text file, as a table with the column text. Raises DataError for what is no text."""
    if path.suffix != ".txt" or not path.is_file():
        raise DataError(f"{path} is not a text file, as the training data is; give one that ends in .txt.")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    documents = [text.strip("\n") for text in re.split(r"\n\s*\n", content) if text.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; give a file with some.")
    return Table({"text": documents}, {}, str(path), typed=True)


def _column(table: Table, config: TextSource) -> str:
    if len(config.text_columns) > 1:
        raise DataError(
            f"text_columns names {len(config.text_columns)} columns; a language model learns from one. "
            "For a prompt and its answer use --set task=data_to_text."
        )
    for name in config.text_columns:
        if name not in table.columns:
            raise DataError(
                f"Column {name!r} is not in {table.where} (it has {listed(table.columns)}); "
                "choose one of these with --set text_columns=NAME."
            )
        return name
    for name in COLUMNS:
        if name in table.columns:
            return name
    raise DataError(
        f"{table.where} has no column with a usual name for text (it has {listed(table.columns)}); "
        "name one with --set text_columns=NAME."
    )


def _texts(table: Table, column: str) -> list[str]:
    """The column's texts without the empty ones, which say nothing."""
    for row, value in enumerate(table.columns[column], start=1):
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"Column {column!r} of {table.where} holds {type(value).__name__} values (row {row}), not text; "
                "choose another with --set text_columns=NAME."
            )
    texts = [text for text in table.columns[column] if text and text.strip()]
    if not texts:
        raise DataError(f"Column {column!r} of {table.where} holds no text; choose another column, or other rows.")
    return texts
