"""Model folders and hub ids to a model with a classification head and its tokenizer, with errors a user can act on."""

from pathlib import Path
from typing import Any

from torch import nn

from pst.data import Examples, align_labels
from pst.errors import ModelError

DEFAULT_MAX_LENGTH = 128


def quiet_transformers() -> None:
    """Keep transformers' own bars and load reports off the terminal; our errors say what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_config(source: str) -> Any:
    """The transformers configuration of *source*. Raises ModelError where there is none."""
    from transformers import AutoConfig

    quiet_transformers()
    if _looks_local(source) and not (Path(source) / "config.json").is_file():
        what = "has no config.json" if Path(source).is_dir() else "does not exist"
        raise ModelError(f"{source} {what}; --model wants a Hugging Face folder or a hub id such as bert-base-uncased.")
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"No model configuration can be read from {source}: {_first_line(error)}") from error


def _looks_local(source: str) -> bool:
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_tokenizer(source: str) -> Any:
    """The fast tokenizer of *source*. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"No tokenizer can be read from {source}: {_first_line(error)}") from error
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
    """The tokens a row keeps: *asked*, or 128 within the model's limit. Raises ModelError beyond that limit."""
    limit = longest_input(config)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit) if limit else DEFAULT_MAX_LENGTH
    if limit and asked > limit:
        raise ModelError(f"max_length is {asked}, but {source} has positions for {limit} tokens; use at most {limit}.")
    return asked


def load_classifier(
    source: str, config: Any, train: Examples, validation: Examples
) -> tuple[nn.Module, Examples, Examples]:
    """A model with a head for the task of *train*, and both sets with that model's label numbers.

    A head that *source* brings is kept, and the labels must fit it; otherwise a new head is drawn from torch's
    generator. Raises DataError where labels do not fit, ModelError where the weights cannot be read.
    """
    from transformers import AutoModelForSequenceClassification

    has_head = any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])
    if has_head:
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
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype="float32")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"The weights of {source} cannot be read: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ModelError(f"The weights of {source} are damaged ({_first_line(error)}); get them again.") from error
        raise
    return model, train, validation
