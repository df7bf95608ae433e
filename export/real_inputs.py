"""The real inputs on which an exported graph is compared with PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from export.source import SPARSITY_FILE
from pst.config import TrainConfig
from pst.data import DataSpec, Examples, load, load_whole
from pst.errors import ArtifactError, PSTError
from pst.files import read_json, refuse_language_model, resolve_model
from pst.progress import note
from pst.tasks import data_to_text, language_modeling

_TEXT_OPTIONS = (
    "data", "validation", "validation_fraction", "text_columns", "task", "input_column", "target_column",
)  # fmt: skip
"""What of a language model's training says where its texts are."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a language model reads: the part of pst.data.Examples that a comparison needs."""

    first: list[str]
    second: list[str] | None
    """What the model is to answer, for a model that was trained on pairs."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.first)


def real_inputs(source: Path, spec: DataSpec | None) -> Examples | Texts | None:
    """Rows of *spec*, or else the validation rows that the model of *source* was trained with.

    A language model reads the texts of either, and needs no labels.

    None, with a note, where the model does not say what these are or they cannot be read any more. Raises DataError
    only for a *spec* that was asked for.
    """
    folder = resolve_model(source)
    generates = _generates(folder)
    if spec is not None and not generates:
        return load_whole(spec)
    config = _recorded(folder)
    if spec is not None:
        return _texts(config | {name.name: getattr(spec, name.name) for name in fields(DataSpec)})
    if not config.get("data"):
        if (folder / SPARSITY_FILE).is_file():
            note(f"{folder / SPARSITY_FILE} does not say what the model was trained on; comparing on built-in text.")
        return None
    try:
        return _texts(config) if generates else _rows(config)
    except (PSTError, TypeError) as error:
        note(f"The training data cannot be read any more ({error}); comparing on built-in text instead.")
        return None


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


def _texts(config: Mapping[str, Any]) -> Texts:
    """Prompts and targets where the model was trained on such, and else documents."""
    known = {name: config[name] for name in _TEXT_OPTIONS if name in config}
    known["text_columns"] = tuple(known.get("text_columns", ()))
    chosen = TrainConfig(**known)
    if chosen.task == "data_to_text":
        pairs = data_to_text.load(chosen, split="validation")
        return Texts(first=pairs.prompts, second=pairs.targets)
    return Texts(first=language_modeling.load(chosen, split="validation").texts, second=None)
