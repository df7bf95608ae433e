"""Model folders that cannot be exported, each with one clear sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    RobertaConfig,
    ViTConfig,
    ViTModel,
)

from export.source import load_source
from pst.errors import ConfigError, ModelError


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT to damage."""
    return shutil.copytree(tiny_bert, tmp_path / "model")


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        load_source(folder, **options)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loads_in_float32_and_eval_mode(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    source = load_source(folder)
    assert {tensor.dtype for tensor in source.model.parameters()} == {torch.float32}
    assert not source.model.training
    assert source.input_names == ("input_ids", "attention_mask", "token_type_ids")
    assert (source.max_length, source.tokenizer.model_max_length) == (64, 64)


def test_no_head(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    words = r"no trained classifier head \(its weights lack classifier\.bias, classifier\.weight\)"
    refused(folder, words, task="classification")
    refused(folder, r"no trained head for question_answering \(its weights lack qa_outputs", task="question_answering")
    assert load_source(folder).task == "feature_extraction"


def test_head_of_another_size(folder: Path) -> None:
    edit(folder / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    refused(folder, r"mixes two models: classifier\.bias is \[2\] in its weights, \[3\] by its config\.json")


def test_unmerged_checkpoint(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    weights["bert.encoder.layer.0.output.dense.parametrizations.weight.original"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors")
    refused(folder, "unmerged checkpoint")


def test_run_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    refused(tmp_path, "--resume")


def test_not_a_model_folder(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json is missing")
    edit(folder / "config.json", model_type="no_such_type")
    refused(folder, "cannot be opened")


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "cut off")


def test_diverged_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors")
    refused(folder, "its training diverged")


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:100])
    refused(folder, "tokenizer that cannot be opened")
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_no_padding_token(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_gpt2, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_source(folder).pad_token_id == 0  # as config.json says
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = None
    config.save_pretrained(folder)
    refused(folder, "names no padding token")


def test_damaged_sparsity_report(folder: Path) -> None:
    report = folder / "sparsity.json"
    for content, match in (("{", "not readable JSON"), ("{}", "not a whole"), ('{"schema_version": 9}', "version 9")):
        report.write_text(content)
        refused(folder, match)


def test_a_head_that_cannot_be_exported(folder: Path, tmp_path: Path) -> None:
    BertForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    refused(folder, r"is a BertForMaskedLM, whose head cannot be exported; .* --task feature_extraction")
    assert load_source(folder, task="feature_extraction").head.outputs == ("last_hidden_state",)
    with pytest.raises(ConfigError, match="Unknown task 'fill_mask'; use one of auto, classification, "):
        load_source(folder, task="fill_mask")


def test_a_model_that_reads_no_tokens(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=16)
    ViTModel(config).save_pretrained(tmp_path)
    refused(tmp_path, "is a ViTModel, which takes no input_ids; export takes models that read tokens")


def test_a_sparse_classifier_without_its_head(sparse_model: Callable[..., Path]) -> None:
    source = load_source(sparse_model("2:4", 0.5), task="feature_extraction")
    assert source.sparsity is not None
    assert {row["name"] for row in source.sparsity["weights"]} < set(source.weights())
    assert source.labels == ()


def test_positions_that_start_after_the_padding_id(tiny_bert: Path, tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=1, type_vocab_size=1,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(tmp_path)
    source = load_source(tmp_path)
    assert (source.max_length, source.input_names) == (64, ("input_ids", "attention_mask"))
    source.model(input_ids=torch.full((1, 64), 5))  # one more would be past the last position


@pytest.mark.parametrize(("limit", "expected"), [(32, 32), (10**30, 64)])
def test_max_length(folder: Path, limit: int, expected: int) -> None:
    edit(folder / "tokenizer_config.json", model_max_length=limit)
    source = load_source(folder)
    assert source.max_length == expected
    assert source.tokenizer.backend_tokenizer.truncation["max_length"] == expected
    assert source.tokenizer.backend_tokenizer.padding is None
