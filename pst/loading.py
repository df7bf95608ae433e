"""Model folders and hub ids to a model with a classification head and its tokenizer, with errors a user can act on."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pst.config import names_classifier
from pst.data import Examples, align_labels
from pst.errors import ConfigError, ModelError
from pst.quiet import quiet_transformers
from pst.structured.storage import from_pretrained

DEFAULT_MAX_LENGTH = 128
SHORTEST = 3
VOCABULARY_FILES = ("tokenizer.json", "vocab.*", "merges.txt", "*.model")


@quiet_transformers()
def load_config(source: str) -> Any:
    """The transformers configuration of *source*. Raises ModelError where there is none."""
    from transformers import AutoConfig

    if _looks_local(source) and not (Path(source) / "config.json").is_file():
        folder = Path(source)
        if (folder / "model" / "config.json").is_file():
            raise ModelError(f"{source} is the folder of a run; the model is {folder / 'model'}.")
        what = "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise ModelError(f"{source} {what}; --model wants a Hugging Face folder or a hub id such as bert-base-uncased.")
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever the file holds, transformers' checks of its fields included
        where = f"{source}/config.json" if Path(source).is_dir() else f"the hub for {source}"
        raise ModelError(
            f"No model configuration can be read from {where}: {first_line(error)} "
            "Give --model a Hugging Face folder, or a hub id that is reachable or cached."
        ) from error


def _looks_local(source: str) -> bool:
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def first_line(error: BaseException) -> str:
    """The first sentence-like line of a message that may be a page long, ending in a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if text.endswith((".", "!", "?")) else text + "."


@quiet_transformers()
def load_tokenizer(source: str) -> Any:
    """The fast tokenizer of *source*. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    remedy = "copy the tokenizer files of its base model there, tokenizer.json above all."
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in VOCABULARY_FILES):
        raise ModelError(f"{source} has no tokenizer; {remedy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(f"No tokenizer can be read from {source}: {first_line(error)} Remedy: {remedy}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where it finds no file
        raise ModelError(f"The tokenizer of {source} has no vocabulary; {remedy}")
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"The tokenizer of {source} has no tokenizer.json (a fast tokenizer), which serving needs.")
    return tokenizer


def longest_input(config: Any) -> int:
    """The most tokens the model has positions for; RoBERTa-like models count theirs from the padding id."""
    positions = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 0)
    offset_types = {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"}
    if positions and getattr(config, "model_type", "") in offset_types:
        positions -= int(config.pad_token_id or 0) + 1
    return positions


def settle_max_length(asked: int | None, config: Any, *, source: str) -> int:
    """The tokens a row keeps: *asked*, or 128 within the model's limit.

    Raises ModelError beyond that limit, ConfigError where there is no room for a word between two special tokens.
    """
    limit = longest_input(config)
    if asked is not None and asked < SHORTEST:
        raise ConfigError(f"max_length is {asked}; it must be at least {SHORTEST}.")
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit) if limit else DEFAULT_MAX_LENGTH
    if limit and asked > limit:
        raise ModelError(f"max_length is {asked}, but {source} has positions for {limit} tokens; use at most {limit}.")
    return asked


@quiet_transformers()
def load_classifier(
    source: str, config: Any, train: Examples, validation: Examples
) -> tuple[nn.Module, Examples, Examples]:
    """A model with a head for the task of *train*, and both sets with that model's label numbers.

    A head that *source* brings is kept, and the labels must fit it; otherwise a new head is drawn from torch's
    generator. Raises DataError where labels do not fit, ModelError where the weights cannot be read.
    """
    if names_classifier(getattr(config, "architectures", None)):
        task = "regression" if config.num_labels == 1 else "classification"
        known = {"label2id": config.label2id, "num_labels": config.num_labels, "task": task, "where": source}
        train, validation = align_labels(train, **known), align_labels(validation, **known)
    else:
        config.num_labels = train.num_labels
        if train.label_names:
            config.id2label = dict(enumerate(train.label_names))
            config.label2id = {name: number for number, name in enumerate(train.label_names)}
    config.problem_type = "regression" if train.task == "regression" else "single_label_classification"
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = load_tokenizer(source).pad_token_id
    try:
        model, report = from_pretrained(
            "AutoModelForSequenceClassification", source, config=config, dtype="float32", output_loading_info=True
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError for shapes, and what a bad config leads to
        raise ModelError(
            f"The weights of {source} cannot be read, or do not fit its config.json: {first_line(error)} "
            "Get the model again, or choose another --model."
        ) from error
    lacking = sorted(name for name in report["missing_keys"] if re.search(r"\.\d+\.", name))
    if lacking:  # a new head is fine; a transformer block left at its random start is not
        raise ModelError(
            f"The weights of {source} lack {len(lacking)} tensors of its transformer blocks ({lacking[0]}, ...); "
            "they belong to another model than its config.json. Get the model again, or choose another --model."
        )
    return model, train, validation


def require_vocabulary(model: Any, token_ids: Sequence[Sequence[int]], *, source: str) -> None:
    """Raise ModelError where a token id is beyond the model's embedding: a tokenizer of another model."""
    size = int(model.get_input_embeddings().num_embeddings)
    highest = max((max(row) for row in token_ids if row), default=0)
    if highest >= size:
        raise ModelError(
            f"The tokenizer of {source} gives token id {highest}, but the model has embeddings for {size}; "
            "the tokenizer is of another model. Copy the right tokenizer files there."
        )


def fingerprint_of(model: nn.Module, source: str) -> str:
    """SHA-256 of all tensors of *model*, as 64 hexadecimal digits. Raises ModelError where a weight is not finite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"The weight {name} of {source} holds NaN or infinity; choose another model.")
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()
