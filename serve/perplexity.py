"""How well a language model's artifact predicts a text, as pst train measures it (pst/tasks/language_modeling.py).

All documents, each followed by the end-of-text token, make one stream, which is cut into blocks; every token of a block
but its first is a target:

    loss = -1/n sum log p(target | everything before it in its block)        perplexity = exp(loss)
"""

import math
from collections.abc import Sequence

import numpy as np

from pst.documents import Documents
from pst.errors import DataError, ModelError
from pst.progress import progress
from serve.decoding import empty_cache
from serve.describe import vocab_size
from serve.engines import Array
from serve.generate import Generator

LONGEST = 1024
"""Tokens of a block at most: its scores are LONGEST x vocabulary numbers."""


def blocks_of(model: Generator, documents: Documents) -> list[list[int]]:
    """Blocks of LONGEST tokens, or of as many as the model takes; the last is shorter, and left out where it is single.

    Raises DataError where there is no target, ModelError where nothing says which token ends a text.
    """
    end = next((token for token in (model.encoder.eos_id, *model.eos_ids) if token is not None), None)
    size = vocab_size(model.folder.path)
    if end is None or (size is not None and end >= size):
        named = "no end-of-text token" if end is None else f"token {end} as the end of a text, but has {size} tokens"
        raise ModelError(
            f"{model.folder.path} names {named}; set eos_token in the model's tokenizer_config.json, or eos_token_id "
            "in its config.json, and export it again."
        )
    length = min(model.max_length, LONGEST)
    stream = [
        token for row in model.encoder.tokenize(documents.texts, special=False) for token in (*row.ids.tolist(), end)
    ]
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise DataError(f"{documents.source} has no two tokens in a row; give more text.")
    return blocks


def token_loss(model: Generator, blocks: Sequence[Sequence[int]], *, batch_size: int) -> tuple[float, int]:
    """The loss in nats a target, and the number of targets."""
    total, targets = 0.0, sum(len(block) - 1 for block in blocks)
    size = max(1, min(batch_size, LONGEST // len(blocks[0])))
    start = 0
    with progress("evaluate", len(blocks)) as advance:
        while start < len(blocks):
            # Only the last block is shorter: it goes alone, and nothing is padded.
            batch = [block for block in blocks[start : start + size] if len(block) == len(blocks[start])]
            total += _nats(model, np.array(batch, dtype=np.int64))
            start += len(batch)
            advance(len(batch))
    return total / targets, targets


def perplexity(loss: float) -> float:
    """exp(loss), cut where it would leave the range of a float."""
    return math.exp(min(loss, 700.0))


def _nats(model: Generator, ids: Array) -> float:
    """The sum of -log p over all targets of blocks of one length, (blocks, length)."""
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape).copy()
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
    logits = model.engine.infer(feeds | empty_cache(model.engine.inputs, len(ids)))["logits"]
    total = 0.0
    for scores, block in zip(logits[:, :-1], ids[:, 1:], strict=True):  # (length - 1, vocabulary), (length - 1,)
        most = scores.max(axis=-1)
        chosen = scores[np.arange(len(block)), block] - most
        total += float((np.log(np.exp(scores - most[:, None]).sum(axis=-1, dtype=np.float64)) - chosen).sum())
    return total
