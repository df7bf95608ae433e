"""Labelled text for classification and regression: one or two texts a row, and a label.

    FILE      .jsonl .json .csv .tsv (each also .gz, .bz2, .xz) or .parquet
    FOLDER    train.ENDING and validation.ENDING (or valid, val, dev; test as the last choice)
    hub id    "imdb", "org/name", "org/name/config", "glue/sst2"; needs a network or a filled cache

Where no validation rows are given, they are taken out of the training rows by the SHA-256 of a row's text: a row is for
validation when the first eight bytes of the hash, as a fraction of 2**64, lie below ``validation_fraction``. The split
therefore depends on nothing but the text: it is the same on every machine, stays as it is when rows are added, and a
text that occurs twice never falls on both sides.

Needs neither torch nor transformers; ``datasets`` is imported inside the functions.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pst.errors import ConfigError, DataError, NoLabelsError
from pst.tables import Table, listed, local, read_file, read_splits

Task = Literal["classification", "regression"]
Split = Literal["train", "validation"]

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence",),
    ("text",),
    ("review",),
    ("content",),
)
LABEL_COLUMNS = ("label", "labels", "score", "target", "similarity_score", "class", "category", "answer", "stars")
MAX_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Which rows to read. ``limit`` keeps that many evenly spaced rows of a split (0: all)."""

    data: str
    text_columns: tuple[str, ...] = ()
    label_column: str = ""
    validation: str = ""
    validation_fraction: float = 0.1
    limit: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("No data is given; name a file, a folder or a hub id with --data.")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1, both excluded."
            )
        if self.limit < 0:
            raise ConfigError(f"limit is {self.limit}; give the number of rows to keep, or 0 for all of them.")
        if len(self.text_columns) > 2:
            raise ConfigError(f"text_columns names {len(self.text_columns)} columns; a model reads one text or two.")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows ready for a tokenizer: ``labels`` is (rows,), int64 class numbers or float32 scores."""

    first: list[str]
    second: list[str] | None
    labels: NDArray[Any]
    label_names: tuple[str, ...] | None
    task: Task
    source: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.first)

    @property
    def num_labels(self) -> int:
        """Outputs that a model needs for these rows: 1 for regression, else the number of classes."""
        if self.task == "regression":
            return 1
        return len(self.label_names) if self.label_names else int(self.labels.max()) + 1

    def subset(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> "Examples":
        """The rows at *indices*, in that order."""
        rows = [int(index) for index in indices]
        first = [self.first[row] for row in rows]
        second = None if self.second is None else [self.second[row] for row in rows]
        return _examples(first, second, self.labels[rows], self.label_names, self.task, self.source)


@dataclass(frozen=True)
class _Coding:
    """How the label column of the training rows is read, so that the validation rows are read alike."""

    task: Task
    names: tuple[str, ...] | None
    strings: bool


def load(spec: DataSpec, *, split: Split) -> Examples:
    """The training or the validation rows of *spec*; both are read with the labels of the training rows.

    Raises DataError where a file, a column or the labels are not usable, saying which and what to do.
    """
    tables, cut = read_splits(spec.data, spec.validation, {"train", split})
    train = tables["train"]
    table = train if cut else tables[split]
    label = _label_column(spec, train)
    coding = _learn(_values(train, label), train, label, strict=True)
    examples = _build(spec, table, coding, label)
    if cut:
        held_out = np.array([in_validation(text, spec.validation_fraction) for text in _joined(examples)])
        examples = examples.subset(np.flatnonzero(held_out == (split == "validation")))
        if not len(examples):
            raise DataError(
                f"{table.where} has too few rows ({len(table)}) for a {split} split with validation_fraction "
                f"{spec.validation_fraction}; give a file of its own with --set validation=FILE."
            )
    examples = _limited(examples, spec.limit)
    if split == "train" and coding.task == "classification" and len(np.unique(examples.labels)) < 2:
        raise DataError(f"The training rows of {table.where} hold one class; give more rows, or raise limit.")
    source = f"{spec.data}, {split} split, {len(examples)} of {len(table)} rows"
    return replace(examples, source=source)


def load_whole(spec: DataSpec) -> Examples:
    """The rows to evaluate on: all of a FILE, the validation rows of a FOLDER or a hub id.

    Labels may leave classes out here; ``align_labels`` checks them against the model. Raises DataError as ``load``.
    """
    path = local(spec.data)
    if path is not None and path.is_file():
        table, part = read_file(path), "whole"
    else:
        tables, cut = read_splits(spec.data, spec.validation, {"validation"})
        if cut:
            return load(spec, split="validation")
        table, part = tables["validation"], "validation split"
    label = _label_column(spec, table)
    examples = _build(spec, table, _learn(_values(table, label), table, label, strict=False), label)
    examples = _limited(examples, spec.limit)
    return replace(examples, source=f"{spec.data}, {part}, {len(examples)} of {len(table)} rows")


def align_labels(
    examples: Examples, *, label2id: Mapping[str, int], num_labels: int, task: str, where: str
) -> Examples:
    """*examples* with the class numbers of a model: names go through *label2id*, numbers must be below *num_labels*.

    Whole numbers count as scores for a regression model. Names match regardless of case; a model whose classes have
    none (LABEL_0, LABEL_1, ...) takes data with as many classes in their own order. *where* names the model in
    messages. Raises DataError for names that the model lacks, for more labels than it has, and for scores where it
    knows classes or the reverse.
    """
    if task == "regression":
        if examples.task == "regression":
            return examples
        if examples.label_names:
            raise DataError(
                f"{where} predicts a score, but {examples.source} holds the classes "
                f"{listed(examples.label_names)}; evaluate a classification model on it."
            )
        return _relabelled(examples, examples.labels.astype(np.float32), None, "regression")
    if examples.task == "regression":
        raise DataError(
            f"{where} predicts one of {num_labels} classes, but {examples.source} holds scores; "
            "choose the column of class labels with --set label_column=NAME."
        )
    names = tuple(name for name, _ in sorted(label2id.items(), key=lambda item: item[1]))
    if examples.label_names:
        known = {name.casefold(): number for name, number in label2id.items()} | dict(label2id)
        numbers = [known.get(name, known.get(name.casefold(), -1)) for name in examples.label_names]
        labels = np.array(numbers, dtype=np.int64)[examples.labels]
        if labels.min() >= 0:
            return _relabelled(examples, labels, names, "classification")
        nameless = all(re.fullmatch(r"LABEL_\d+", name) for name in label2id)
        if not nameless or len(examples.label_names) < num_labels:
            unknown = examples.label_names[examples.labels[np.argmin(labels)]]
            raise DataError(
                f"{examples.source} holds the label {unknown!r}, which {where} does not know "
                f"(it knows {listed(names)}); rename it, or choose another column with --set label_column=NAME."
            )
    highest = max(int(examples.labels.max()) + 1, len(examples.label_names or ()))
    if highest > num_labels:
        raise DataError(
            f"{examples.source} holds {highest} labels, more labels than the checkpoint {where} has ({num_labels}); "
            "use a model with as many, or other rows."
        )
    return examples


def in_validation(text: str, fraction: float) -> bool:
    """Whether a row with this text is for validation, in a split that leaves *fraction* of the rows for it."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) < fraction * 2**64


# -- rows ----------------------------------------------------------------------------------------------------------


def _build(spec: DataSpec, table: Table, coding: _Coding, label: str) -> Examples:
    columns = text_columns_of(spec, table)
    texts = [table.columns[name] for name in columns]
    for name, values in zip(columns, texts, strict=True):
        for row, value in enumerate(values, start=1):
            if value is None:
                raise DataError(
                    f"Row {row} of {table.where} has no text in column {name!r}; fill it or remove the row."
                )
            if not isinstance(value, str):
                raise DataError(
                    f"Column {name!r} of {table.where} holds {type(value).__name__} values (row {row}), not text; "
                    f"choose another of {listed(table.columns)} with --set text_columns=NAME."
                )
    for row, parts in enumerate(zip(*texts, strict=True), start=1):
        if not any(part.strip() for part in parts):
            raise DataError(f"Row {row} of {table.where} has an empty text ({' and '.join(columns)}); remove the row.")
    labels = _encode(_values(table, label), table, label, coding)
    second = texts[1] if len(texts) == 2 else None
    return _examples(texts[0], second, labels, coding.names, coding.task, table.where)


def _examples(
    first: list[str],
    second: list[str] | None,
    labels: NDArray[Any],
    names: tuple[str, ...] | None,
    task: Task,
    source: str,
) -> Examples:
    content = json.dumps([first, second, labels.tolist(), names, task]).encode()
    fingerprint = hashlib.sha256(content).hexdigest()
    return Examples(
        first=first,
        second=second,
        labels=labels,
        label_names=names,
        task=task,
        source=source,
        fingerprint=fingerprint,
    )


def _relabelled(examples: Examples, labels: NDArray[Any], names: tuple[str, ...] | None, task: Task) -> Examples:
    return _examples(examples.first, examples.second, labels, names, task, examples.source)


def _joined(examples: Examples) -> list[str]:
    if examples.second is None:
        return examples.first
    return [f"{first}\x1f{second}" for first, second in zip(examples.first, examples.second, strict=True)]


def _limited(examples: Examples, limit: int) -> Examples:
    rows = len(examples)
    return examples.subset(np.arange(limit) * rows // limit) if 0 < limit < rows else examples


# -- columns and labels --------------------------------------------------------------------------------------------


def text_columns_of(spec: DataSpec, table: Table) -> tuple[str, ...]:
    """The one or two text columns that *spec* names, or that have a usual name. Raises DataError where none is."""
    if spec.text_columns:
        for name in spec.text_columns:
            _require_column(table, name, "text_columns")
        return spec.text_columns
    for names in TEXT_COLUMNS:
        if all(name in table.columns for name in names):
            return names
    raise DataError(
        f"{table.where} has no column with a usual name for text (it has {listed(table.columns)}); "
        "name one or two with --set text_columns=NAME[,NAME]."
    )


def _label_column(spec: DataSpec, table: Table) -> str:
    if spec.label_column:
        _require_column(table, spec.label_column, "label_column")
        return spec.label_column
    taken = text_columns_of(spec, table)
    for name in LABEL_COLUMNS:
        if name in table.columns and name not in taken:
            return name
    raise NoLabelsError(
        f"{table.where} has no column with a usual name for labels (it has {listed(table.columns)}); "
        "name it with --set label_column=NAME."
    )


def _require_column(table: Table, name: str, option: str) -> None:
    if name not in table.columns:
        raise DataError(
            f"Column {name!r} is not in {table.where} (it has {listed(table.columns)}); "
            f"choose one of these with --set {option}=NAME."
        )


def _values(table: Table, label: str) -> list[Any]:
    """The label column as int, float or str values of one kind; numbers that are all whole come as int."""
    _require_column(table, label, "label_column")
    values = table.columns[label]
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, str) and not value.strip()) or value != value:
            raise DataError(f"Row {row} of {table.where} has no label in column {label!r}; fill it or remove the row.")
    if not table.typed:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                values = [kind(value) for value in values]
                break
    kinds = {type(value) for value in values}
    if kinds <= {bool} or kinds <= {int}:
        return [int(value) for value in values]
    if kinds <= {int, float}:
        for row, value in enumerate(values, start=1):
            if not np.isfinite(value):
                raise DataError(f"Row {row} of {table.where} has the label {value}; a finite number is needed.")
        return [int(value) for value in values] if all(float(value).is_integer() for value in values) else values
    if kinds <= {str}:
        return values
    raise DataError(
        f"Column {label!r} of {table.where} mixes or holds {' and '.join(sorted(kind.__name__ for kind in kinds))} "
        "values; labels are all numbers or all names."
    )


def _learn(values: list[Any], table: Table, label: str, *, strict: bool) -> _Coding:
    """How to read these labels. *strict* asks for what training needs: two classes, numbered without a gap."""
    names = table.names.get(label)
    kind = type(values[0])
    if kind is float:
        if strict and len(set(values)) < 2:
            raise DataError(f"Every row of {table.where} has the score {values[0]}; there is nothing to learn.")
        return _Coding("regression", None, strings=False)
    present = sorted(set(values))
    if strict and len(present) < 2:
        raise DataError(
            f"Every row of {table.where} has the label {present[0]!r}; training needs two classes or more: "
            "add rows of another, or choose another column with --set label_column=NAME."
        )
    if kind is str:
        if len(present) > MAX_CLASSES:
            raise DataError(
                f"Column {label!r} of {table.where} holds {len(present)} different names, which does not look like "
                "labels; choose another column with --set label_column=NAME."
            )
        return _Coding("classification", tuple(present), strings=True)
    if present[0] < 0:
        hint = "-1 marks hidden labels" if present[0] == -1 else "classes are numbered from 0"
        raise DataError(f"{table.where} holds the label {present[0]} ({hint}); use rows whose labels start at 0.")
    if strict and names is None and present != list(range(len(present))):
        raise DataError(
            f"The labels of {table.where} are {listed(present)}; number them 0 to {len(present) - 1} without a gap, "
            "or write them as names."
        )
    return _Coding("classification", names, strings=False)


def _encode(values: list[Any], table: Table, label: str, coding: _Coding) -> NDArray[Any]:
    strings = isinstance(values[0], str)
    if strings != coding.strings or (isinstance(values[0], float) and coding.task == "classification"):
        raise DataError(
            f"Column {label!r} of {table.where} holds other values ({values[0]!r}) than in the training rows; "
            "write the labels of both alike."
        )
    if coding.task == "regression":
        return np.array(values, dtype=np.float32)
    if strings:
        numbers = {name: number for number, name in enumerate(coding.names or ())}
        for row, value in enumerate(values, start=1):
            if value not in numbers:
                raise DataError(
                    f"Row {row} of {table.where} has the label {value!r}, which no training row has "
                    f"({listed(numbers)}); correct it or remove the row."
                )
        return np.array([numbers[value] for value in values], dtype=np.int64)
    if min(values) < 0 or max(values) > np.iinfo(np.int64).max:
        raise DataError(f"{table.where} holds the label {min(values)}; classes are numbered from 0.")
    return np.array(values, dtype=np.int64)
