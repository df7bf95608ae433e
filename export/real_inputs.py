"""The real inputs on which an exported graph is compared with PyTorch."""

from pathlib import Path

from export.source import SPARSITY_FILE
from pst.data import DataSpec, Examples, load, load_whole
from pst.errors import ArtifactError, PSTError
from pst.files import read_json, refuse_language_model, resolve_model
from pst.progress import note


def real_inputs(source: Path, spec: DataSpec | None) -> Examples | None:
    """Rows of *spec*, or else the validation rows that the model of *source* was trained with.

    None, with a note, where the model does not say what these are or they cannot be read any more. Raises DataError
    only for a *spec* that was asked for.
    """
    refuse_language_model(resolve_model(source))
    if spec is not None:
        return load_whole(spec)
    report_file = resolve_model(source) / SPARSITY_FILE
    if not report_file.is_file():
        return None
    report = read_json(report_file, ArtifactError, "train the model again, or remove that file.")
    recorded = report.get("config")
    if not isinstance(recorded, dict) or not recorded.get("data"):
        note(f"{report_file} does not say what the model was trained on; comparing on built-in sentences.")
        return None
    try:
        known = {name: recorded[name] for name in DataSpec.__dataclass_fields__ if name in recorded}
        known["text_columns"] = tuple(known.get("text_columns", ()))
        return load(DataSpec(**known | {"limit": 0}), split="validation")
    except (PSTError, TypeError) as error:
        note(f"The training data cannot be read any more ({error}); comparing on built-in sentences instead.")
        return None
