"""Models and tokenizers that cannot be used: one clear error each, and no silent replacement."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pst import data
from pst.errors import DataError, ModelError
from pst.loading import (
    load_classifier,
    load_config,
    load_tokenizer,
    longest_input,
    require_vocabulary,
    settle_max_length,
)
from pst.train import train
from tests.pst.training import options


@pytest.fixture
def copy(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT that a test may spoil."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "copy"))


def rows(path: Path, labels: list[Any]) -> data.Examples:
    """Examples with these labels."""
    path.write_text(
        "".join(json.dumps({"sentence": f"the film {n}", "label": label}) + "\n" for n, label in enumerate(labels))
    )
    return data.load_whole(data.DataSpec(data=str(path)))


def load(folder: Path, examples: data.Examples) -> Any:
    return load_classifier(str(folder), load_config(str(folder)), examples, examples)


# -- config.json ---------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing does not exist; --model wants a Hugging Face folder or a hub id"):
        load_config(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"has no config\.json; --model wants"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"model_type": "no-such-type"}',
        '{"model_type": "bert", "hidden_size": "wide"}',
        "\xff\xfe",
    ],
)
def test_a_config_that_is_none(content: str, copy: Path) -> None:
    (copy / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError) as caught:
        load_config(str(copy))
    message = str(caught.value)
    assert message.startswith(f"No model configuration can be read from {copy}/config.json: ")
    assert message.endswith(" Give --model a Hugging Face folder, or a hub id that is reachable or cached.")
    assert "\n" not in message


OFFLINE = """
import sys
from pst.errors import ModelError
from pst.loading import load_config, load_tokenizer
for load in (load_config, load_tokenizer):
    for source in ("prajjwal1/no-such-model", "models/not here"):
        try:
            load(source)
        except ModelError as error:
            print(error)
"""


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    lines = ended.stdout.splitlines()
    assert len(lines) == 4, ended
    assert lines[0].startswith("No model configuration can be read from the hub for prajjwal1/no-such-model: We couldn")
    assert lines[0].endswith("or a hub id that is reachable or cached.")
    assert lines[2].startswith("No tokenizer can be read from prajjwal1/no-such-model: ")


# -- the tokenizer -------------------------------------------------------------------------------------------------


def test_no_tokenizer_is_never_replaced_by_an_empty_one(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
        with pytest.raises(ModelError, match=r"copy has no tokenizer; copy the tokenizer files of its base model"):
            load_tokenizer(str(copy))
    (copy / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ModelError, match=r"The tokenizer of .* has no vocabulary; copy"):
        load_tokenizer(str(copy))


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "9"}'])
def test_a_damaged_tokenizer(content: str, copy: Path) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"No tokenizer can be read from .*copy: .* Remedy: copy the tokenizer files"):
        load_tokenizer(str(copy))


def test_a_tokenizer_of_another_model(copy: Path, reviews_file: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["film"] = 5000
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ModelError, match=r"gives token id 5000, but the model has embeddings for \d+; .* another model"
    ):
        train(options(copy, reviews_file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_vocabulary_fits_when_the_highest_id_does(tiny_bert: Path, tmp_path: Path) -> None:
    model, _, _ = load(tiny_bert, rows(tmp_path / "rows.jsonl", [0, 1]))
    size = model.get_input_embeddings().num_embeddings
    require_vocabulary(model, [[0], [], [size - 1]], source="tiny")
    with pytest.raises(ModelError):
        require_vocabulary(model, [[0], [size]], source="tiny")


# -- lengths -------------------------------------------------------------------------------------------------------


class Config:
    """A configuration with just these fields."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_position_embeddings": 512, "model_type": "bert"}, 512),
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, 512),
        ({"n_positions": 1024, "model_type": "gpt2"}, 1024),
        ({"model_type": "xlnet"}, 0),
    ],
)
def test_longest_input(fields: dict[str, Any], limit: int) -> None:
    config = Config(**fields)
    assert longest_input(config) == limit
    assert settle_max_length(None, config, source="m") == 128
    if limit:
        assert settle_max_length(limit, config, source="m") == limit
        with pytest.raises(ModelError, match=rf"max_length is {limit + 1}, but m has positions for {limit} tokens"):
            settle_max_length(limit + 1, config, source="m")
    else:
        assert settle_max_length(9999, config, source="m") == 9999


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_a_model_runs_at_the_longest_input_and_not_beyond(kind: str) -> None:
    """The limit is the model's own: one more token and its forward pass fails."""
    from transformers import AutoModel, BertConfig, GPT2Config, RobertaConfig

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    config = {
        "bert": lambda: BertConfig(**sizes, max_position_embeddings=20),
        "roberta": lambda: RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=1),
        "gpt2": lambda: GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=20),
    }[kind]()
    model = AutoModel.from_config(config).eval()
    limit = longest_input(config)
    with torch.no_grad():
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


# -- weights and labels --------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not a header here}")


def reshape(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {"bert.encoder.layer.0.output.dense.weight": torch.zeros(3, 3)}, path, {"format": "pt"})


@pytest.mark.parametrize("spoil", [truncate, empty, garbage, reshape, Path.unlink])
def test_weights_that_cannot_be_read(spoil: Callable[[Path], None], copy: Path, tmp_path: Path) -> None:
    spoil(copy / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"The weights of .*copy cannot be read, or do not fit its config.json: "
    ) as caught:
        load(copy, rows(tmp_path / "rows.jsonl", [0, 1]))
    assert str(caught.value).endswith(" Get the model again, or choose another --model.")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_not_replaced_by_random_ones(copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 32 tensors of its transformer blocks \(bert\.encoder\.layer\.0\..*another"
    ):
        load(copy, rows(tmp_path / "rows.jsonl", [0, 1]))


def test_a_model_type_without_a_classifier(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="cannot be read, or do not fit"):
        load(copy, rows(tmp_path / "rows.jsonl", [0, 1]))


def test_more_labels_than_the_head(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds 3 labels, more labels than the checkpoint .* has \(2\)"):
        load(tiny_bert, rows(tmp_path / "rows.jsonl", [0, 1, 2]))


def test_labels_by_name_follow_the_head(tiny_bert: Path, tmp_path: Path) -> None:
    _, train_rows, _ = load(tiny_bert, rows(tmp_path / "a.jsonl", ["positive", "negative", "positive"]))
    assert train_rows.labels.tolist() == [1, 0, 1]
    with pytest.raises(
        DataError, match=r"holds the label 'bad', which .* does not know \(it knows NEGATIVE, POSITIVE\)"
    ):
        load(tiny_bert, rows(tmp_path / "b.jsonl", ["bad", "positive"]))


def test_scores_for_a_classifier(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"predicts one of 2 classes, but .* holds scores"):
        load(tiny_bert, rows(tmp_path / "rows.jsonl", [0.5, 1.5]))


def test_float16_weights_train_as_float32(copy: Path, tmp_path: Path) -> None:
    path = copy / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    model, _, _ = load(copy, rows(tmp_path / "rows.jsonl", [0, 1]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
