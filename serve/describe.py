"""What a folder says about the model in it, whatever stage wrote it, without loading a runtime.

run/, model/    config.json, and sparsity.json where pst train wrote it
artifact/       export.json beside model.onnx; without one (made by other tools), config.json alone
file.onnx       nothing but max_positions and vocab_size, where a config.json lies beside it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from export import manifest
from pst.errors import ArtifactError, ModelError
from pst.files import read_json, refuse_language_model, resolve_model

# These models number positions from pad_token_id + 1, so that many of the table's rows cannot be used.
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "longformer", "mpnet"})

Task = Literal["classification", "regression", "text_generation"]


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A classifier, a regressor or a language model on disk.

    Fields that only a config.json or an export.json tells may be empty.
    """

    path: Path
    """The folder that holds the tokenizer: of a run, its model folder."""
    name: str
    kind: Literal["model", "artifact"]
    file: Path
    """model.onnx or the weights."""
    task: Task
    labels: tuple[str, ...]
    max_length: int
    """Tokens that one input is cut to; of text_generation, the most that prompt and answer have together."""
    pattern: str | None
    """``dense``, ``unstructured``, ``2:4`` ...; None where no sparsity.json or export.json says."""
    sparsity: float | None
    """Measured share of zeros in the pruned weights, 0 to 1; of pattern structured, of what was removed."""
    size_bytes: int
    """The model's files, external data included; tokenizer and configuration left out."""

    @property
    def num_labels(self) -> int:
        """Columns of the logits."""
        return 1 if self.task == "regression" else len(self.labels)

    @property
    def label2id(self) -> dict[str, int]:
        """Label names with their row of the logits."""
        return {label: index for index, label in enumerate(self.labels)}


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", ModelError, "give a run, model or artifact folder, or copy it again.")


def max_positions(folder: Path) -> int | None:
    """Longest sequence that config.json's model has positions for; None without one or without a limit."""
    if not (folder / "config.json").is_file():
        return None
    config = _config(folder)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(positions, int):
        return None
    if config.get("model_type") in OFFSET_POSITIONS:
        positions -= (config.get("pad_token_id") or 0) + 1
    return positions


def vocab_size(folder: Path) -> int | None:
    """config.json's vocab_size; None without one."""
    value = _config(folder).get("vocab_size") if (folder / "config.json").is_file() else None
    return value if isinstance(value, int) else None


def _max_length(folder: Path, sparsity: Mapping[str, Any]) -> int:
    """sparsity.json's, else the tokenizer's model_max_length; never beyond the model's positions."""
    limits = [max_positions(folder), sparsity.get("max_length")]
    if limits[1] is None and (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json", ModelError, "copy the whole folder again.")
        limits.append(settings.get("model_max_length"))
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1e6]
    return min(known, default=512)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return tuple(f"LABEL_{index}" for index in range(int(config.get("num_labels") or 2)))
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def _task(config: Mapping[str, Any], labels: tuple[str, ...]) -> Task:
    if config.get("problem_type") == "regression" or (config.get("problem_type") is None and len(labels) == 1):
        return "regression"
    return "classification"


def refuse_multi_label(folder: ModelFolder) -> None:
    """Raise ModelError where a text of the model may have several labels, each with a sigmoid of its own."""
    if _config(folder.path).get("problem_type") == "multi_label_classification":
        raise ModelError(
            f"{folder.path} gives each text several labels (multi_label_classification); eval and serve take one label "
            "a text. Open its model.onnx in ONNX Runtime, and take the sigmoid of its logits."
        )


def _name(path: Path) -> str:
    return path.resolve().name


def describe(path: Path, *, verify: bool = False) -> ModelFolder:
    """Read *path*: a run, model or artifact folder. *verify* also compares an artifact's files with their SHA-256.

    Raises ArtifactError where it does not exist or is damaged, ModelError where it holds no model, or a language model
    that is not exported.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give a run, model or artifact folder.")
    if path.is_file():
        raise ArtifactError(f"{path} is a file; give the folder that holds it, its config.json and its tokenizer.")
    if (path / "model.onnx").exists():
        return _describe_artifact(path, verify=verify)
    folder = resolve_model(path)
    config = _config(folder)
    refuse_language_model(folder)
    weights = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin")]
    if not weights:
        raise ModelError(f"{folder} holds neither model.onnx nor model.safetensors; train or export again.")
    report: dict[str, Any] = {}
    if (folder / "sparsity.json").is_file():
        report = read_json(folder / "sparsity.json", ModelError, "train the model again.")
    labels = _labels(config)
    return ModelFolder(
        path=folder,
        name=_name(path),
        kind="model",
        file=weights[0],
        task=_task(config, labels),
        labels=labels,
        max_length=_max_length(folder, report),
        pattern=report.get("pattern"),
        sparsity=report.get("sparsity", {}).get("measured"),
        size_bytes=sum(file.stat().st_size for file in weights),
    )


def _describe_artifact(folder: Path, *, verify: bool) -> ModelFolder:
    config = _config(folder)
    labels = _labels(config)
    files = [file for file in folder.iterdir() if file.name == "model.onnx" or file.name.startswith("model.onnx")]
    task, max_length, pattern, sparsity = _task(config, labels), _max_length(folder, {}), None, None
    if (folder / "export.json").is_file():
        made = manifest.load(folder, verify=verify)
        if made.task not in get_args(Task):
            raise ModelError(
                f"{folder} was exported for {made.task}; eval, bench and serve take classifiers, regressors and "
                "language models so far. Open its model.onnx in ONNX Runtime or Optimum."
            )
        task, labels, max_length = cast("Task", made.task), tuple(made.labels), made.max_length
        pattern, sparsity = made.pattern, made.sparsity.get("measured")
    return ModelFolder(
        path=folder,
        name=_name(folder),
        kind="artifact",
        file=folder / "model.onnx",
        task=task,
        labels=labels,
        max_length=max_length,
        pattern=pattern,
        sparsity=sparsity,
        size_bytes=sum(file.stat().st_size for file in files),
    )
