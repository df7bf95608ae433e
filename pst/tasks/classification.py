"""One or two texts a row to a class or a score: a classification head on any encoder or decoder."""

from functools import partial
from typing import Any

import torch
from torch import nn

from pst import data
from pst.batches import Encoded, encode
from pst.config import TrainConfig
from pst.distributed import Processes
from pst.evaluate import evaluate
from pst.loading import load_classifier, load_config, load_tokenizer, require_vocabulary, settle_max_length
from pst.tasks import Prepared


def prepare(config: TrainConfig, *, examples: tuple[data.Examples, data.Examples] | None = None) -> Prepared:
    """See pst.tasks. *examples* (train, validation) stand in for ``config.data``."""
    spec = data_spec(config)
    rows, held_out = examples or (data.load(spec, split="train"), data.load(spec, split="validation"))
    model_config = load_config(config.model)
    max_length = settle_max_length(config.max_length, model_config, source=config.model)
    tokenizer = load_tokenizer(config.model)
    model, rows, held_out = load_classifier(config.model, model_config, rows, held_out)
    encoded, encoded_held_out = (encode(tokenizer, part, max_length=max_length) for part in (rows, held_out))
    for part in (encoded, encoded_held_out):
        require_vocabulary(model, part.columns["input_ids"], source=config.model)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        max_length=max_length,
        train=encoded,
        evaluate=partial(_evaluate, encoded=encoded_held_out, task=rows.task),
        task=rows.task,
        fingerprints={"training rows": rows.fingerprint, "validation rows": held_out.fingerprint},
        data={"train": _describe(rows), "validation": _describe(held_out)},
    )


def data_spec(config: TrainConfig) -> data.DataSpec:
    """Where the rows of *config* come from."""
    return data.DataSpec(
        data=config.data,
        text_columns=config.text_columns,
        label_column=config.label_column,
        validation=config.validation,
        validation_fraction=config.validation_fraction,
        limit=config.limit,
    )


def _evaluate(
    model: nn.Module,
    *,
    batch_size: int,
    device: torch.device,
    processes: Processes,
    final: bool = True,
    encoded: Encoded,
    task: str,
) -> dict[str, float]:
    """See pst.tasks.Measure; there is nothing here that would be worth leaving out."""
    return evaluate(model, encoded, task=task, batch_size=batch_size, device=device, processes=processes)


def _describe(examples: data.Examples) -> dict[str, Any]:
    return {"source": examples.source, "rows": len(examples), "sha256": examples.fingerprint}
