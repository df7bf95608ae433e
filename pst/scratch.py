"""A GPT-2 from nothing: a vocabulary learned from texts and random weights, as a folder to give to ``--model``.

For machines that no pretrained model can be had on, and for languages that none was trained on.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pst.errors import ConfigError
from pst.files import atomic_folder
from pst.quiet import quiet_transformers

END_OF_TEXT = "<|endoftext|>"


def make_gpt2(
    folder: Path,
    texts: Iterable[str],
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    positions: int = 256,
    vocabulary: int = 8000,
    dropout: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Write a GPT2LMHeadModel and its tokenizer to *folder*; returns how many parameters the model has.

    The tokenizer is byte-level BPE with at most *vocabulary* tokens, learned from *texts*: any text can be written
    with it. As in the original, one token, END_OF_TEXT, begins and ends a text. Weights are drawn as transformers
    does for GPT-2; the defaults are those of the smallest original, but for positions and vocabulary. Raises
    ConfigError for sizes that cannot be, RunError where *folder* holds something and *overwrite* is not set.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    if min(layers, width, heads, positions) < 1 or width % heads:
        raise ConfigError(f"{layers} layers of width {width} with {heads} heads: the width is a multiple of the heads.")
    if vocabulary < 257:
        raise ConfigError(f"vocabulary is {vocabulary}; the bytes and the end of text alone are 257 tokens.")
    tokenizer = train_tokenizer(texts, size=vocabulary, max_length=positions)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    with quiet_transformers(), atomic_folder(folder, overwrite=overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return int(model.num_parameters())


def train_tokenizer(texts: Iterable[str], *, size: int, max_length: int) -> Any:
    """A fast byte-level BPE tokenizer of at most *size* tokens; the same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
