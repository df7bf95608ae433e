"""A prompt to a text, such as facts to a sentence that states them: a causal language model, scored by BLEU.

    [bos] prompt eos target eos

A row is tokenized as above. The end-of-text token separates the two: it is one token in every vocabulary, occurs in no
text, and never melts with its neighbours, so that prompt + tokenizer.eos_token asks the saved model in the same way.
bos stands there only for a tokenizer whose bos is another token than its eos. White space around both texts goes.
The loss counts the target and its eos alone. A row longer than max_length loses the end of its prompt; a target that
is too long by itself loses its end as well, but never the eos.

Measured on the validation rows: loss and perplexity of a target token, and BLEU (a fraction, pst/generation.py) of
what beam search answers to each distinct prompt, against all targets that the rows give to it. ``limit`` keeps so many
training rows, and so many prompts for validation with all their targets, evenly spaced. Where no validation rows are
given, they are split off by the prompt, as pst/data.py does, so that no prompt falls on both sides.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pst.config import TrainConfig
from pst.data import in_validation
from pst.distributed import Processes
from pst.errors import ConfigError, DataError
from pst.generation import answer, bleu, sacrebleu
from pst.loading import longest_input, require_vocabulary, settle_max_length
from pst.progress import note
from pst.quiet import quiet_transformers
from pst.sequences import Sequences, load_causal, token_loss
from pst.tables import Table, listed, read_splits
from pst.tasks import Prepared

COLUMNS = (
    ("meaning_representation", "human_reference"),
    ("mr", "ref"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("input", "target"),
    ("input", "output"),
    ("source", "target"),
    ("question", "answer"),
    ("instruction", "output"),
)
"""Usual names of the prompt's and the target's column."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows of two texts each."""

    prompts: list[str]
    targets: list[str]
    source: str

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all rows, as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.prompts, self.targets]).encode()).hexdigest()

    def by_prompt(self) -> dict[str, list[str]]:
        """The targets of each distinct prompt, in the order of the rows."""
        found: dict[str, list[str]] = {}
        for prompt, target in zip(self.prompts, self.targets, strict=True):
            found.setdefault(prompt, []).append(target)
        return found


def prepare(config: TrainConfig, *, examples: tuple[Pairs, Pairs] | None = None) -> Prepared:
    """See pst.tasks. *examples* (train, validation) stand in for ``config.data``.

    Raises DataError for rows that lack a prompt or a target, ModelError for a model that is not causal, ConfigError
    where answers do not fit into the model's positions, or sacrebleu is missing.
    """
    sacrebleu()  # now, not after the training
    rows, held_out = examples or (load(config, split="train"), load(config, split="validation"))
    model, tokenizer = load_causal(config.model)
    max_length = settle_max_length(config.max_length, model.config, source=config.model)
    train = encode(tokenizer, rows, max_length=max_length)
    validation = encode(tokenizer, held_out, max_length=max_length)
    for part in (train, validation):
        require_vocabulary(model, part.ids, source=config.model)
    set_decoding(model, config)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for whoever generates with the result
    questions = held_out.by_prompt()
    evaluate = partial(
        _evaluate,
        tokenizer=tokenizer,
        rows=validation,
        prompts=encode_prompts(tokenizer, list(questions), most=longest_prompt(model, config)),
        references=list(questions.values()),
        no_repeat_ngram=config.no_repeat_ngram,
    )
    described = {"train": _describe(rows), "validation": _describe(held_out) | {"prompts": len(questions)}}
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        max_length=max_length,
        train=train,
        evaluate=evaluate,
        task="data_to_text",
        fingerprints={"training rows": rows.fingerprint, "validation rows": held_out.fingerprint},
        data=described,
    )


def _evaluate(
    model: Any,
    *,
    batch_size: int,
    device: torch.device,
    processes: Processes,
    final: bool = True,
    tokenizer: Any,
    rows: Sequences,
    prompts: list[list[int]],
    references: list[list[str]],
    no_repeat_ngram: int,
) -> dict[str, float]:
    """See pst.tasks.Measure. Beam search is slow: before the end of a run, loss and perplexity have to do."""
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "processes": processes}
    losses = token_loss(model, rows, **options)
    if not final:
        return losses
    answers = answer(model, tokenizer, prompts, no_repeat_ngram=no_repeat_ngram, **options)
    return {"bleu": bleu(answers, references), **losses}


# -- tokens --------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, pairs: Pairs, *, max_length: int) -> Sequences:
    """The rows as *[bos] prompt eos target eos*, of *max_length* tokens at most; targets begin after the first eos."""
    begin, end = _begin(tokenizer), [int(tokenizer.eos_token_id)]
    ids, starts, cut = [], [], 0
    room = max_length - len(begin) - 2
    prompts = dict(zip(unique := list(dict.fromkeys(pairs.prompts)), _tokens(tokenizer, unique), strict=True))
    for prompt_text, target in zip(pairs.prompts, _tokens(tokenizer, pairs.targets), strict=True):
        prompt = prompts[prompt_text]
        cut += len(prompt) + len(target) > room
        target = target[:room]
        asked = begin + prompt[: room - len(target)] + end
        ids.append(asked + target + end)
        starts.append(len(asked))
    if cut:
        note(f"{cut} of {len(pairs)} rows ({pairs.source}) are longer than max_length {max_length}; prompts are cut.")
    return Sequences(ids=ids, starts=starts, pad=int(tokenizer.pad_token_id))


def encode_prompts(tokenizer: Any, prompts: list[str], *, most: int) -> list[list[int]]:
    """*[bos] prompt eos* of each, which the model is to continue; a prompt of more than *most* tokens is cut."""
    begin, end = _begin(tokenizer), [int(tokenizer.eos_token_id)]
    return [begin + tokens[: most - len(begin) - 1] + end for tokens in _tokens(tokenizer, prompts)]


def _begin(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [] if bos is None or bos == tokenizer.eos_token_id else [int(bos)]


@quiet_transformers()  # it has something to say about rows above the tokenizer's own limit
def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer([text.strip() for text in texts], add_special_tokens=False)["input_ids"]
    return ids


# -- decoding ------------------------------------------------------------------------------------------------------


def set_decoding(model: Any, config: TrainConfig) -> None:
    """Beam search by the options of *config* in ``model.generation_config``, which is saved with the model.

    no_repeat_ngram is not among them: what transformers knows by a like name counts the prompt as well.
    """
    settings = model.generation_config
    settings.num_beams = config.num_beams
    settings.length_penalty = config.length_penalty if config.num_beams > 1 else None  # there is nothing to penalize
    settings.max_new_tokens = config.max_new_tokens


def longest_prompt(model: Any, config: TrainConfig) -> int:
    """Tokens that a prompt may have, specials included, so that an answer fits into the model's positions."""
    positions = longest_input(model.config)
    if not positions:  # as many as there is memory for
        return 2**30
    if config.max_new_tokens > positions - 3:  # bos, one token, eos
        raise ConfigError(
            f"max_new_tokens is {config.max_new_tokens}, which leaves no room for a prompt in the {positions} "
            f"positions of {config.model}; use --set max_new_tokens={positions // 2}."
        )
    return positions - config.max_new_tokens


# -- rows ----------------------------------------------------------------------------------------------------------


def load(config: TrainConfig, *, split: str) -> Pairs:
    """The rows of *split* ("train" or "validation") of ``config.data``. Raises DataError where they are not usable."""
    tables, cut = read_splits(config.data, config.validation, {split})
    table = tables["train" if cut else split]
    names = _columns(table, config)
    prompts, targets = (_texts(table, name, part) for name, part in zip(names, ("prompt", "target"), strict=True))
    rows = list(range(len(table)))
    if cut:
        rows = [i for i in rows if in_validation(prompts[i], config.validation_fraction) == (split == "validation")]
        if not rows:
            raise DataError(
                f"{table.where} has too few distinct prompts for a {split} split with validation_fraction "
                f"{config.validation_fraction}; give a file of its own with --set validation=FILE."
            )
    if split == "train":
        rows = _spread(rows, config.limit)
    else:
        kept = set(_spread(list(dict.fromkeys(prompts[i] for i in rows)), config.limit))
        rows = [i for i in rows if prompts[i] in kept]
    source = f"{config.data}, {split} split, {len(rows)} of {len(table)} rows"
    return Pairs(prompts=[prompts[i] for i in rows], targets=[targets[i] for i in rows], source=source)


def _spread(items: list[Any], limit: int) -> list[Any]:
    """*limit* of the items, evenly spaced; all for 0."""
    return [items[i * len(items) // limit] for i in range(limit)] if 0 < limit < len(items) else items


def _columns(table: Table, config: TrainConfig) -> tuple[str, str]:
    asked = (config.input_column, config.target_column)
    for name, option in zip(asked, ("input_column", "target_column"), strict=True):
        if name and name not in table.columns:
            raise DataError(
                f"Column {name!r} is not in {table.where} (it has {listed(table.columns)}); "
                f"choose one of these with --set {option}=NAME."
            )
    if all(asked):
        return asked
    for pair in COLUMNS:
        fits = all(not name or name == usual for name, usual in zip(asked, pair, strict=True))
        if fits and all(name in table.columns for name in pair):
            return pair
    raise DataError(
        f"{table.where} has no columns with usual names for prompt and target (it has {listed(table.columns)}); "
        "name them with --set input_column=NAME --set target_column=NAME."
    )


def _texts(table: Table, column: str, part: str) -> list[str]:
    values = table.columns[column]
    for row, value in enumerate(values, start=1):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"Row {row} of {table.where} has an empty {part} ({column}); fill it or remove the row.")
        if not isinstance(value, str):
            raise DataError(
                f"Column {column!r} of {table.where} holds {type(value).__name__} values (row {row}), not text; "
                "choose another with --set input_column=NAME or target_column=NAME."
            )
    return values


def _describe(pairs: Pairs) -> dict[str, Any]:
    return {"source": pairs.source, "rows": len(pairs), "sha256": pairs.fingerprint}
