"""Answers of a causal language model by beam search, and their BLEU against several references for one prompt."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pst.distributed import Processes
from pst.errors import ConfigError
from pst.materialize import materialized
from pst.progress import progress
from pst.quiet import quiet_transformers

BEAMS = 320
"""Most sequences that are decoded side by side: prompts x beams."""


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    no_repeat_ngram: int = 0,
    batch_size: int,
    device: torch.device,
    processes: Processes | None = None,
) -> list[str]:
    """What *model* continues each of *prompts* (token ids) with; ``model.generation_config`` says how to search.

    No *no_repeat_ngram* tokens in a row occur twice in an answer (0: any may). Prompts of like length are decoded
    together, padded on the left. Each process answers its share, and all of them get every answer. Masked weights are
    made once. Draws no random number, unless the configuration samples.
    """
    processes = processes or Processes()
    training = model.training
    model.eval()
    order = processes.share(np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist())
    size = max(1, min(batch_size, BEAMS // (model.generation_config.num_beams or 1)))
    answers: dict[int, str] = {}
    with quiet_transformers(), materialized(model), progress("answer", len(order)) as advance:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            longest = max(len(prompts[index]) for index in chosen)
            input_ids = torch.full((len(chosen), longest), tokenizer.pad_token_id, dtype=torch.int64)
            attention_mask = torch.zeros_like(input_ids)
            for position, index in enumerate(chosen):
                tokens = torch.tensor(prompts[index], dtype=torch.int64)
                input_ids[position, longest - len(tokens) :] = tokens
                attention_mask[position, longest - len(tokens) :] = 1
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                logits_processor=[NoRepeat(no_repeat_ngram, start=longest)] if no_repeat_ngram else [],
            )
            texts = tokenizer.batch_decode(
                output[:, longest:], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answers.update(zip(chosen, (text.strip() for text in texts), strict=True))
            advance(len(chosen))
    model.train(training)
    for share in processes.gather(answers):
        answers |= share
    return [answers[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class NoRepeat:
    """Bans each token that would complete a sequence of *size* tokens which the answer holds already.

    The option of the same name in transformers counts the prompt as part of the answer, so that a name of *size*
    tokens could never be taken over from it.
    """

    size: int
    start: int
    """Where answers begin."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """*scores* (N, V) of the next token, -inf where banned; *input_ids* (N, T) holds prompts and answers."""
        answers = input_ids[:, self.start :]
        if answers.shape[1] < self.size:
            return scores
        windows = answers.unfold(1, self.size, 1)  # (N, W, size)
        last = answers[:, answers.shape[1] - self.size + 1 :]  # (N, size - 1)
        seen = (windows[:, :, :-1] == last[:, None]).all(-1)  # (N, W)
        zero = torch.zeros_like(scores)
        return scores + zero.scatter_add_(1, windows[:, :, -1], zero[:, :1].masked_fill(seen, -torch.inf))


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU as a fraction in [0, 1], a hundredth of what sacrebleu prints: 13a tokens, with case, exp smoothing.

    ``references[i]`` are the right answers to prompt i, one or more. Raises ConfigError without sacrebleu.
    """
    # sacrebleu wants one list for each place among the references; None where a prompt has none, which it leaves out,
    # while "" would count as a reference of length 0
    most = max(len(texts) for texts in references)
    columns = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
    # force: no warning that the texts come with their tokens apart, as those of E2E do
    return float(sacrebleu().corpus_bleu(list(answers), columns, force=True).score) / 100.0


def sacrebleu() -> Any:
    """The module. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("sacrebleu")
    except ImportError as error:
        raise ConfigError(
            "Task data_to_text measures BLEU with the package sacrebleu, which is not installed; "
            "add it with pip install sacrebleu."
        ) from error
