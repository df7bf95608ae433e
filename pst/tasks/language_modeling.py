"""Plain text to the next token: a causal language model, measured by its loss and perplexity.

pst/documents.py reads the text. All documents, each followed by the end-of-text token, make one stream, which is cut
into blocks of max_length tokens; the last block is shorter, and goes where it is a single token, which has nothing to
be predicted from. The loss counts every token of a block but its first.
"""

from functools import partial
from typing import Any

import torch

from pst.config import TrainConfig
from pst.distributed import Processes
from pst.documents import Documents, load
from pst.errors import DataError
from pst.loading import require_vocabulary, settle_max_length
from pst.quiet import quiet_transformers
from pst.sequences import Sequences, load_causal, token_loss
from pst.tasks import Prepared


def prepare(config: TrainConfig, *, examples: tuple[Documents, Documents] | None = None) -> Prepared:
    """See pst.tasks. *examples* (train, validation) stand in for ``config.data``.

    Raises DataError for data without text, ModelError for a model that is not causal.
    """
    documents, held_out = examples or (load(config, split="train"), load(config, split="validation"))
    model, tokenizer = load_causal(config.model)
    max_length = settle_max_length(config.max_length, model.config, source=config.model)
    blocks, held_out_blocks = (encode(tokenizer, part, max_length=max_length) for part in (documents, held_out))
    for part in (blocks, held_out_blocks):
        require_vocabulary(model, part.ids, source=config.model)
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        max_length=max_length,
        train=blocks,
        evaluate=partial(_evaluate, rows=held_out_blocks),
        task="language_modeling",
        fingerprints={"training rows": documents.fingerprint, "validation rows": held_out.fingerprint},
        data={"train": _describe(documents, blocks), "validation": _describe(held_out, held_out_blocks)},
    )


def _evaluate(
    model: Any, *, batch_size: int, device: torch.device, processes: Processes, final: bool = True, rows: Sequences
) -> dict[str, float]:
    return token_loss(model, rows, batch_size=batch_size, device=device, processes=processes)


@quiet_transformers()  # it has something to say about documents above the tokenizer's own limit
def encode(tokenizer: Any, documents: Documents, *, max_length: int) -> Sequences:
    """Blocks of *max_length* tokens; raises DataError where there is not one to learn from."""
    tokens = tokenizer(documents.texts, add_special_tokens=False)["input_ids"]
    stream = [token for document in tokens for token in (*document, int(tokenizer.eos_token_id))]
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise DataError(f"{documents.source} has no two tokens in a row; give more text.")
    return Sequences(ids=blocks, starts=[1] * len(blocks), pad=int(tokenizer.pad_token_id))


def _describe(documents: Documents, blocks: Sequences) -> dict[str, Any]:
    tokens = int(blocks.lengths().sum())
    return {"source": documents.source, "rows": len(documents), "tokens": tokens, "sha256": documents.fingerprint}
