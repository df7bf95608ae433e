"""Tiny random models of every architecture, with every head that reads a whole text, as folders."""

from pathlib import Path
from typing import Any

from .conftest import save_tokenizer

ARCHITECTURES = ("bert", "roberta", "distilbert", "mpnet", "electra", "gpt2", "llama")
HEADS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "feature_extraction": "AutoModel",
}
POSITIONS = 64
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": POSITIONS, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    # Positions are numbered from the padding id on, so that the first ones are never used; MPNet's id is always 1.
    "roberta": {"max_position_embeddings": POSITIONS + 1, "type_vocab_size": 1},
    "mpnet": {"max_position_embeddings": POSITIONS + 2},
    "electra": {"embedding_size": 16},
}
LABELS = ("NEGATIVE", "NEUTRAL", "POSITIVE")


def make_encoder(folder: Path, model_type: str, head: str, *, seed: int = 0, **more: Any) -> Path:
    """Write a random encoder of two layers and 32 features with *head*, and its tokenizer; returns *folder*.

    *more* are options of its configuration; *head* is one of HEADS.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(folder, model_max_length=POSITIONS)
    torch.manual_seed(seed)
    options = _SIZES | _OWN.get(model_type, {}) | {"vocab_size": vocabulary} | more
    if head == "regression":
        options |= {"num_labels": 1, "problem_type": "regression"}
    elif head in ("classification", "token_classification"):
        options |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = transformers.AutoConfig.for_model(model_type, **options)
    getattr(transformers, HEADS[head]).from_config(config).save_pretrained(folder)
    return folder
