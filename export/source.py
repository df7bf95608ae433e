"""What an export starts from: a Hugging Face folder, loaded once by its head's class, in float32 and eval mode."""

import inspect as python_inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from export.cache import INPUTS, CacheLayer, cache_layers
from export.heads import Head, choose_head
from export.tensors import read_model_tensors
from pst.errors import ModelError
from pst.files import read_json, resolve_model
from pst.quiet import quiet_transformers
from pst.structured.storage import from_pretrained

Array = np.ndarray[Any, Any]
SPARSITY_FILE = "sparsity.json"
_SPARSITY_SCHEMA = 1
_DEFAULT_LENGTH = 512  # tokens, where neither the model nor its tokenizer states a limit
_UNLIMITED = 1 << 24  # tokenizers without a limit state one of about 1e30


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded model folder."""

    folder: Path
    model: Any
    """A transformers model of the head's class, float32, eval mode, on the CPU."""
    tokenizer: Any
    """A fast tokenizer with model_max_length = max_length and a padding token."""
    sparsity: dict[str, Any] | None
    """The content of sparsity.json, its weights by this model's names; None for a folder that has none."""
    head: Head
    task: str
    """The head's task, or regression."""
    labels: tuple[str, ...]
    """Names by label id, of classification and token_classification alone."""
    max_length: int
    """Tokens of a row; of a decoder, the past included."""
    pad_token_id: int
    input_names: tuple[str, ...]
    """input_ids, attention_mask, token_type_ids for a model that tells segments apart, position_ids for a decoder."""
    cache: tuple[CacheLayer, ...]
    """The layers of a decoder's key/value cache; empty for other models."""

    def weights(self) -> dict[str, Array]:
        """The model's floating tensors by name, without copying them."""
        state = self.model.state_dict()
        return {name: tensor.numpy() for name, tensor in state.items() if tensor.is_floating_point()}


def load_source(path: Path, *, task: str = "auto") -> Source:
    """Load a run or model folder for export; *task* names a file of export/heads, or "auto" for what config.json says.

    Raises ModelError: not a model folder, damaged, without a trained head, not merged, without a usable tokenizer.
    """
    folder = resolve_model(path)
    config_file = _check_files(folder)
    named = config_file.get("architectures") or []
    head = choose_head([str(name) for name in named], task=task, where=str(folder))
    sparsity = _read_sparsity(folder)
    with quiet_transformers():
        model = _load_model(folder, head)
        input_names = INPUTS if head.cached else _input_names(model, folder)
        tokenizer = _load_tokenizer(folder)
    config = model.config
    regression = head.task == "classification" and (
        (sparsity or {}).get("task", "") == "regression"
        or (config.num_labels == 1 and config.problem_type in (None, "regression"))
    )
    named_labels = head.labelled and not regression
    labels = tuple(str(config.id2label[index]) for index in range(config.num_labels)) if named_labels else ()
    max_length = _max_length(model, tokenizer, sparsity, folder)
    pad_token_id = _set_padding(tokenizer, config, folder, cached=head.cached)
    tokenizer.model_max_length = max_length
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.enable_truncation(max_length)
    return Source(
        folder=folder, model=model, tokenizer=tokenizer, sparsity=_renamed(sparsity, model), head=head,
        task="regression" if regression else head.task, labels=labels, max_length=max_length,
        pad_token_id=pad_token_id, input_names=input_names,
        cache=cache_layers(model, where=str(folder)) if head.cached else (),
    )  # fmt: skip


def _renamed(sparsity: dict[str, Any] | None, model: Any) -> dict[str, Any] | None:
    """The report with the names of its weights in *model*, which may be the trained one without its head."""
    prefix, known = f"{model.base_model_prefix}.", model.state_dict()
    if sparsity is None or not model.base_model_prefix:
        return sparsity

    def rename(name: str) -> str:
        bare = name.removeprefix(prefix)
        return bare if name not in known and bare in known else name

    return sparsity | {"weights": [row | {"name": rename(str(row["name"]))} for row in sparsity["weights"]]}


def _check_files(folder: Path) -> dict[str, Any]:
    """config.json, of a folder that is whole as far as its files' headers tell."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give a run folder of pst train, or a Hugging Face model folder.")
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is a run without a finished model; continue it with pst train --resume, then export it."
        )
    config = read_json(
        folder / "config.json", ModelError, "give a run folder of pst train, or a Hugging Face model folder."
    )
    unmerged = next((name for name in read_model_tensors(folder) if ".parametrizations." in name), None)
    if unmerged is not None:
        raise ModelError(
            f"{folder} holds an unmerged checkpoint ({unmerged}); merge it with merge_ and save it again, "
            "or export the run folder that pst train wrote."
        )
    return config


def _read_sparsity(folder: Path) -> dict[str, Any] | None:
    path = folder / SPARSITY_FILE
    if not path.exists():
        return None
    report = read_json(path, ModelError, "train again, or delete the file to export the weights as found.")
    damaged = f"{path} is not a whole sparsity report; train again, or delete it to export the weights as found."
    if not isinstance(report.get("schema_version"), int):
        raise ModelError(damaged)
    if report["schema_version"] > _SPARSITY_SCHEMA:
        raise ModelError(f"{path} has schema version {report['schema_version']}, this program reads 1; update it.")
    try:
        str(report["pattern"]), float(report["sparsity"]["requested"]), float(report["sparsity"]["measured"])
        for row in report["weights"]:
            str(row["name"]), [int(size) for size in row["shape"]], int(row["axis"]), float(row["density"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(damaged) from error
    return report


def _load_model(folder: Path, head: Head) -> Any:
    try:
        model, report = from_pretrained(
            head.auto_class,
            folder,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in words of our own
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder} cannot be opened as a model for {head.task}: {reason} "
            f"Give a folder that {head.auto_class} opens, or another --task."
        ) from error
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise ModelError(
            f"{folder} mixes two models: {name} is {list(stored)} in its weights, {list(wanted)} by its config.json; "
            "copy the whole folder again, or train again."
        )
    missing = sorted(name for name in report["missing_keys"] if not _unused(name, head))
    if missing:
        what = "weights" if any(re.search(r"\.\d+\.", name) for name in missing) else "trained classifier head"
        what = what if head.task == "classification" or what == "weights" else f"trained head for {head.task}"
        raise ModelError(
            f"{folder} has no {what} (its weights lack {', '.join(missing[:3])}); "
            "train it with pst train, then export that run."
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values()):
        raise ModelError(f"{folder} has weights that are NaN or infinite; its training diverged, so train it again.")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = head.cached
    return model.eval()


def _unused(name: str, head: Head) -> bool:
    """Whether nothing that the head gives depends on a weight: the pooler of a model without a head."""
    return head.task == "feature_extraction" and "pooler." in name


def _load_tokenizer(folder: Path) -> Any:
    remedy = "copy the tokenizer's files of its base model into the folder."
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        raise ModelError(f"{folder} has no tokenizer; {remedy}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ModelError(f"{folder} has a tokenizer that cannot be opened ({error}); {remedy}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder} has a tokenizer without tokenizer.json, which serving needs; {remedy}")
    return tokenizer


def _max_length(model: Any, tokenizer: Any, sparsity: dict[str, Any] | None, folder: Path) -> int:
    """Tokens a row is cut to: as trained, else the tokenizer's limit, in any case no more than the positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or _UNLIMITED
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from the padding id on, so that the first few are never used.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1
    limit = int(tokenizer.model_max_length) if tokenizer.model_max_length < _UNLIMITED else _UNLIMITED
    trained = (sparsity or {}).get("max_length")
    if trained is not None:
        if not isinstance(trained, int) or not 0 < trained <= positions:
            raise ModelError(f"{folder / SPARSITY_FILE} states max_length {trained}; the model has 1 to {positions}.")
        return trained
    return min(positions, limit) if min(positions, limit) < _UNLIMITED else _DEFAULT_LENGTH


def _set_padding(tokenizer: Any, config: Any, folder: Path, *, cached: bool) -> int:
    """Make sure that batches can be padded, a decoder's on the left; return the padding token's id.

    A decoder without a padding token pads with its end-of-text token: the attention mask alone says what counts.
    """
    if cached:
        tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
        if tokenizer.pad_token_id is None and config.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        token = None if config.pad_token_id is None else tokenizer.convert_ids_to_tokens(int(config.pad_token_id))
        if token is None:
            raise ModelError(
                f"{folder} names no padding token, so it cannot take batches; set pad_token_id in config.json, "
                "for GPT-2 to its eos_token_id, and train with it."
            )
        tokenizer.pad_token = token
    return int(tokenizer.pad_token_id)


def _input_names(model: Any, folder: Path) -> tuple[str, ...]:
    """Optimum's input names. Segment ids go in only where the model has more than one segment to tell apart.

    Raises ModelError for a model that does not read tokens.
    """
    accepted = python_inspect.signature(model.forward).parameters
    missing = [name for name in ("input_ids", "attention_mask") if name not in accepted]
    if "input_ids" in missing or (missing and not any(entry.kind is entry.VAR_KEYWORD for entry in accepted.values())):
        raise ModelError(
            f"{folder} is a {type(model).__name__}, which takes no {' and no '.join(missing)}; "
            "export takes models that read tokens, with a mask for padding."
        )
    segments = "token_type_ids" in accepted and (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
