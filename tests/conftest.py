"""Tiny models and data that every folder's tests share, made on the spot: no hub, no download."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # tests/pst/kernels need it, and Triton reads it on its first import

GOOD = ("lovely", "superb", "moving", "brilliant", "charming", "honest")
BAD = ("dull", "awful", "empty", "tedious", "clumsy", "false")
FILLER = ("the", "film", "is", "a", "story", "of", "love", "and", "war", "plot", "actor", "scene", "very", "not", "it")


def save_tokenizer(folder: Path, *, model_max_length: int) -> int:
    """Write a word-level fast tokenizer in BERT's form to *folder*; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*specials, *GOOD, *BAD, *FILLER, ".", ",", "!"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers that nobody has seeded are the same in every run, whatever ran before in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BertForSequenceClassification: 2 layers, hidden 32, labels NEGATIVE and POSITIVE."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny_bert")
    size = save_tokenizer(folder, model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT2ForSequenceClassification: 2 layers, width 32, Conv1D weights stored inputs x outputs."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    folder = tmp_path_factory.mktemp("tiny_gpt2")
    size = save_tokenizer(folder, model_max_length=64)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, num_labels=2, pad_token_id=0,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sparse_model(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``sparse_model("2:4", 0.5)``: the tiny BERT, pruned by magnitude to that pattern, with its sparsity.json."""
    made: dict[tuple[str, float], Path] = {}

    def make(pattern: str, sparsity: float = 0.5) -> Path:
        from pst.models import architecture
        from pst.patterns import parse_pattern

        if (pattern, sparsity) in made:
            return made[pattern, sparsity]
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        folder = tmp_path_factory.mktemp("sparse_model")
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
        rules, rows = architecture("bert"), []
        for name, module in model.named_modules():
            if rules.prunable.search(name):
                weight = module.weight.data
                weight *= parse_pattern(pattern).mask(weight.abs(), sparsity, axis=1)
                density = float((weight != 0).double().mean())
                rows.append({"name": f"{name}.weight", "shape": list(weight.shape), "axis": 1, "density": density})
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
        measured = 1 - float(np.mean([row["density"] for row in rows]))
        report: dict[str, Any] = {
            "schema_version": 1, "method": "magnitude", "pattern": pattern,
            "sparsity": {"requested": sparsity, "measured": measured}, "weights": rows,
            "task": "classification", "max_length": 64, "config": {}, "base_model": "tiny", "data": {},
            "metrics": {}, "seed": 0, "versions": {}, "git_revision": None,
        }  # fmt: skip
        (folder / "sparsity.json").write_text(json.dumps(report), encoding="utf-8")
        made[pattern, sparsity] = folder
        return folder

    return make


def write_reviews(path: Path, *, rows: int, seed: int) -> Path:
    """Write *rows* made-up one-line reviews with their label (1 = good) as JSON lines."""
    random = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            label = int(random.integers(2))
            words = [*random.choice(FILLER, int(random.integers(2, 12))), *random.choice(GOOD if label else BAD, 2)]
            random.shuffle(words)
            file.write(json.dumps({"sentence": " ".join(words) + " .", "label": label}) + "\n")
    return path


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 one-line reviews with labels 0 and 1."""
    return write_reviews(tmp_path_factory.mktemp("reviews") / "reviews.jsonl", rows=64, seed=1)
