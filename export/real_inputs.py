"""The real inputs on which an exported graph is compared with PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from export.heads import choose_head
from export.source import SPARSITY_FILE
from pst import documents
from pst.config import TrainConfig
from pst.data import DataSpec, Examples, Split, in_validation, load, load_whole, text_columns_of
from pst.errors import ArtifactError, DataError, ModelError, NoLabelsError, PSTError
from pst.files import read_json, refuse_language_model, resolve_model
from pst.progress import note
from pst.tables import local, read_splits
from pst.tasks import data_to_text

_TEXT_OPTIONS = (
    "data", "validation", "validation_fraction", "text_columns", "task", "input_column", "target_column",
)  # fmt: skip
"""What of a language model's training says where its texts are."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The part of pst.data.Examples that a comparison needs: texts without labels."""

    first: list[str]
    second: list[str] | None
    """What the model is to answer, for a model that was trained on pairs."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.first)


def real_inputs(source: Path, spec: DataSpec | None, *, task: str = "auto") -> Examples | Texts | None:
    """Rows of *spec*, or else the validation rows that the model of *source* was trained with.

    *task* is export's. Labels are read for classification and regression, where *spec* has some; other models, and rows
    without, need none: their texts are compared on, and there is no metric to measure.

    None, with a note, where the model does not say what these are or they cannot be read any more. Raises DataError
    only for a *spec* that was asked for.
    """
    folder = resolve_model(source)
    generates = _generates(folder)
    if spec is not None:
        return _texts(_chosen(folder, spec)) if generates else _asked_for(folder, spec, task=task)
    config = _recorded(folder)
    if not config.get("data"):
        if (folder / SPARSITY_FILE).is_file():
            note(f"{folder / SPARSITY_FILE} does not say what the model was trained on; comparing on built-in text.")
        return None
    try:
        return _texts(config) if generates else _rows(config)
    except (PSTError, TypeError) as error:
        note(f"The training data cannot be read any more ({error}); comparing on built-in text instead.")
        return None


def _asked_for(folder: Path, spec: DataSpec, *, task: str) -> Examples | Texts:
    config = read_json(folder / "config.json", ModelError, "give a run folder, or a Hugging Face model folder.")
    head = choose_head([str(name) for name in config.get("architectures") or []], task=task, where=str(folder))
    if head.task == "classification" and not spec.data.endswith(".txt"):
        try:
            return load_whole(spec)
        except NoLabelsError as error:
            note(f"{error} Without labels, texts are compared on, and no metric is measured.")
    return unlabelled(spec, split="validation", whole=True)


def calibration_texts(source: Path, spec: DataSpec) -> Texts:
    """The rows that int8 is calibrated on: the training rows of *spec*, so that a metric is measured on others.

    Of a single FILE, as pst/data.py splits it. Raises DataError where there is no text.
    """
    folder = resolve_model(source)
    return _texts(_chosen(folder, spec), split="train") if _generates(folder) else unlabelled(spec, split="train")


def unlabelled(spec: DataSpec, *, split: Split, whole: bool = False) -> Texts:
    """The texts of *spec* alone: a table of any kind (pst/data.py), or a .txt file with blank lines between texts.

    *whole*: of a single FILE all rows. Raises DataError where there is no text.
    """
    path = local(spec.data)
    single = path is not None and path.is_file()
    if path is not None and path.suffix == ".txt" and single:
        tables, cut = {"train": documents.read_text(path)}, True
    else:
        tables, cut = read_splits(spec.data, spec.validation, {"train", split})
    table = tables["train" if cut or (whole and single) else split]
    names = text_columns_of(spec, table)
    rows = [row for row in zip(*(table.columns[name] for name in names), strict=True) if any(row)]
    if not all(isinstance(part, str) for row in rows for part in row):
        raise DataError(
            f"{' and '.join(names)} of {table.where} holds values that are no text; choose other columns with "
            "--set text_columns=NAME[,NAME]."
        )
    if cut and not (whole and single):
        fraction = spec.validation_fraction
        rows = [row for row in rows if in_validation("\x1f".join(row), fraction) == (split == "validation")] or rows
    if 0 < spec.limit < len(rows):
        rows = [rows[place * len(rows) // spec.limit] for place in range(spec.limit)]
    if not rows:
        raise DataError(f"{table.where} holds no text; give a file with some.")
    return Texts(first=[row[0] for row in rows], second=[row[1] for row in rows] if len(names) == 2 else None)


def _chosen(folder: Path, spec: DataSpec) -> dict[str, Any]:
    return _recorded(folder) | {each.name: getattr(spec, each.name) for each in fields(DataSpec)}


def _recorded(folder: Path) -> dict[str, Any]:
    """The options that the model was trained with; empty where nothing says."""
    report_file = folder / SPARSITY_FILE
    if not report_file.is_file():
        return {}
    config = read_json(report_file, ArtifactError, "train the model again, or remove that file.").get("config")
    return config if isinstance(config, dict) else {}


def _generates(folder: Path) -> bool:
    try:
        refuse_language_model(folder)
    except PSTError:
        return True
    return False


def _rows(config: Mapping[str, Any]) -> Examples:
    known = {name: config[name] for name in DataSpec.__dataclass_fields__ if name in config}
    known["text_columns"] = tuple(known.get("text_columns", ()))
    return load(DataSpec(**known | {"limit": 0}), split="validation")


def _texts(config: Mapping[str, Any], *, split: Split = "validation") -> Texts:
    """Prompts and targets where the model was trained on such, and else documents."""
    known = {name: config[name] for name in _TEXT_OPTIONS if name in config}
    known["text_columns"] = tuple(known.get("text_columns", ()))
    chosen = TrainConfig(**known)
    if chosen.task == "data_to_text":
        pairs = data_to_text.load(chosen, split=split)
        return Texts(first=pairs.prompts, second=pairs.targets)
    return Texts(first=documents.load(chosen, split=split).texts, second=None)
