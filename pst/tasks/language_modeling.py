"""Plain text to the next token: a causal language model, measured by its loss and perplexity.

    FILE      .txt, or a table (pst/tables.py) with a text column
    FOLDER    train.txt and validation.txt (or valid, val, dev, test), or tables so named
    hub id    a data set with a text column

A row of a table is a document. In a text file, blank lines part documents. All documents, each followed by the
end-of-text token, make one stream, which is cut into blocks of max_length tokens; the last block is shorter, and goes
where it is a single token, which has nothing to be predicted from. The loss counts every token of a block but its
first. Where no validation rows are given, documents are split off as in pst/data.py. ``limit`` keeps so many documents
of each, evenly spaced.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pst.config import TrainConfig
from pst.data import in_validation
from pst.distributed import Processes
from pst.errors import DataError
from pst.loading import require_vocabulary, settle_max_length
from pst.quiet import quiet_transformers
from pst.sequences import Sequences, load_causal, token_loss
from pst.tables import VALIDATION_NAMES, Table, listed, read_splits
from pst.tasks import Prepared

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


def prepare(config: TrainConfig, *, examples: tuple[Documents, Documents] | None = None) -> Prepared:
    """See pst.tasks. *examples* (train, validation) stand in for ``config.data``.

    Raises DataError for data without text, ModelError for a model that is not causal.
    """
    documents, held_out = examples or (load(config, split="train"), load(config, split="validation"))
    model, tokenizer = load_causal(config.model)
    max_length = settle_max_length(config.max_length, model.config, source=config.model)
    blocks, held_out_blocks = (encode(tokenizer, part, max_length=max_length) for part in (documents, held_out))
    for part in (blocks, held_out_blocks):
        require_vocabulary(model, part.ids, source=config.model)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        max_length=max_length,
        train=blocks,
        evaluate=partial(_evaluate, rows=held_out_blocks),
        task="language_modeling",
        fingerprints={"training rows": documents.fingerprint, "validation rows": held_out.fingerprint},
        data={"train": _describe(documents, blocks), "validation": _describe(held_out, held_out_blocks)},
    )


def _evaluate(
    model: Any, *, batch_size: int, device: torch.device, processes: Processes, final: bool = True, rows: Sequences
) -> dict[str, float]:
    return token_loss(model, rows, batch_size=batch_size, device=device, processes=processes)


@quiet_transformers()  # it has something to say about documents above the tokenizer's own limit
def encode(tokenizer: Any, documents: Documents, *, max_length: int) -> Sequences:
    """Blocks of *max_length* tokens; raises DataError where there is not one to learn from."""
    tokens = tokenizer(documents.texts, add_special_tokens=False)["input_ids"]
    stream = [token for document in tokens for token in (*document, int(tokenizer.eos_token_id))]
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise DataError(f"{documents.source} has no two tokens in a row; give more text.")
    return Sequences(ids=blocks, starts=[1] * len(blocks), pad=int(tokenizer.pad_token_id))


# -- documents -----------------------------------------------------------------------------------------------------


def load(config: TrainConfig, *, split: str) -> Documents:
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
    if 0 < config.limit < len(texts):
        texts = [texts[i * len(texts) // config.limit] for i in range(config.limit)]
    return Documents(texts=texts, source=f"{config.data}, {split} split, {len(texts)} of {total} documents")


def _text_splits(config: TrainConfig) -> tuple[dict[str, Table], bool] | None:
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
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    documents = [text.strip("\n") for text in re.split(r"\n\s*\n", content) if text.strip()]
    if not documents:
        raise DataError(f"{path} holds no text; give a file with some.")
    return Table({"text": documents}, {}, str(path), typed=True)


def _column(table: Table, config: TrainConfig) -> str:
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


def _describe(documents: Documents, blocks: Sequences) -> dict[str, Any]:
    tokens = int(blocks.lengths().sum())
    return {"source": documents.source, "rows": len(documents), "tokens": tokens, "sha256": documents.fingerprint}
