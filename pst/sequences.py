"""Token sequences for a causal language model: the rows, the model and tokenizer, and the loss of a token.

The logits at position t predict the token at t + 1, so the loss counts every target but one at position 0. Losses and
perplexities are a mean over targets, not over rows:

    loss = -1/n sum log p(target | everything before it)        perplexity = exp(loss)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst.distributed import Processes
from pst.errors import ModelError
from pst.loading import first_line, load_config, load_tokenizer
from pst.materialize import materialized
from pst.objective import IGNORED, next_token
from pst.progress import progress
from pst.quiet import quiet_transformers
from pst.structured.storage import from_pretrained

TOKENS = 2**13
"""Most tokens of a batch that is only measured: their logits, in float32, are TOKENS x vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Tokenized rows, unpadded."""

    ids: list[list[int]]
    """The tokens of each row, two at least."""
    starts: list[int]
    """Position of each row's first target, at least 1; what comes before is read, but not learned."""
    pad: int
    """The token that fills a batch; attention_mask and labels leave it out, so the end of text can serve as one."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.ids)

    def lengths(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """(rows,) tokens of each row."""
        return np.array([len(row) for row in self.ids], dtype=np.int64)

    def weight(self, rows: Sequence[int]) -> int:
        """The loss of *rows* is a mean over this many targets."""
        return sum(len(self.ids[row]) - self.starts[row] for row in rows)

    def batch(self, rows: Sequence[int], *, length: int = 0) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` of these *rows*, (B, T) int64, padded on the right.

        T is that of the longest row, or *length* where that is more.
        Labels are IGNORED on the padding and before each row's first target; the model shifts them by itself.
        """
        shape = (len(rows), max(length, *(len(self.ids[row]) for row in rows)))
        input_ids = torch.full(shape, self.pad, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for position, row in enumerate(rows):
            tokens = torch.tensor(self.ids[row], dtype=torch.int64)
            start, end = self.starts[row], len(tokens)
            input_ids[position, :end] = tokens
            attention_mask[position, :end] = 1
            labels[position, start:end] = tokens[start:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@torch.inference_mode()
def token_loss(
    model: nn.Module, rows: Sequences, *, batch_size: int, device: torch.device, processes: Processes
) -> dict[str, float]:
    """``loss`` (nats a target) and ``perplexity`` over all targets of *rows*; each process measures its share.

    Masked weights are made once, and logits count in float32.
    """
    training = model.training
    model.eval()
    lengths = rows.lengths()
    order = processes.share(np.argsort(lengths, kind="stable").tolist())
    size = max(1, min(batch_size, TOKENS // int(lengths.max())))
    total = 0.0
    with materialized(model), progress("evaluate", len(order)) as advance:
        for start in range(0, len(order), size):
            batch = {name: value.to(device) for name, value in rows.batch(order[start : start + size]).items()}
            labels = batch.pop("labels")
            logits, targets = next_token(model(**batch).logits, labels)  # (targets, V), (targets,)
            total += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            advance(len(labels))
    model.train(training)
    loss = sum(processes.gather(total)) / rows.weight(range(len(rows)))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # beyond, exp leaves the range of a float


@quiet_transformers()
def load_causal(source: str) -> tuple[Any, Any]:
    """The causal language model of *source* in float32, and its tokenizer, which can pad and end a text.

    A tokenizer without a padding token, such as GPT-2's, pads with its end-of-text token. Raises ModelError for a
    model of another kind, such as an encoder, for weights that cannot be read, and without an end-of-text token.
    """
    from transformers import GenerationConfig

    config = load_config(source)
    named = getattr(config, "architectures", None) or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise ModelError(
            f"{source} is no causal language model (config.json names {', '.join(named) or 'no architecture'}); "
            "this task needs one that predicts the next token, such as GPT2LMHeadModel."
        )
    try:
        model, report = from_pretrained("AutoModelForCausalLM", source, dtype="float32", output_loading_info=True)
    except Exception as error:  # OSError, SafetensorError, RuntimeError for shapes, and what a bad config leads to
        raise ModelError(
            f"The weights of {source} cannot be read, or do not fit its config.json: {first_line(error)} "
            "Get the model again, or choose another --model."
        ) from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(
            f"The weights of {source} lack {len(lacking)} tensors of the model ({lacking[0]}, ...); they belong to "
            "another model than its config.json. Get the model again, or choose another --model."
        )
    if _looks_ahead(model):
        raise ModelError(
            f"{source} is no causal language model: what it predicts depends on the tokens that follow. "
            "This task needs a decoder such as GPT2LMHeadModel."
        )
    tokenizer = load_tokenizer(source)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokenizer of {source} has no end-of-text token; set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.loss_type = "ForCausalLM"  # what transformers falls back to for GPT2LMHeadModel, with a warning
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


@torch.inference_mode()
def _looks_ahead(model: nn.Module) -> bool:
    """Whether another last token changes the logits of the first: BERT's language model does unless is_decoder."""
    model.eval()  # as from_pretrained left it
    first = model(input_ids=torch.tensor([[0, 1, 0], [0, 1, 1]])).logits[:, 0]
    return not torch.equal(first[0], first[1])
