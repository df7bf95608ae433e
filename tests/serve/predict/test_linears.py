"""A model's linears: the same from its weights, its config.json and its artifact."""

import json
import shutil
from pathlib import Path

import pytest

from pst.errors import ModelError
from serve.predict.linears import Linear, read_linears


def sizes(linears: list[Linear]) -> set[tuple[int, int, int]]:
    return {(each.outputs, each.inputs, each.count) for each in linears}


def test_weights_config_and_artifact_agree(tiny_bert: Path, bert_artifact: Path, tmp_path: Path) -> None:
    from_weights = read_linears(tiny_bert)
    config = json.loads((tiny_bert / "config.json").read_text(encoding="utf-8"))
    h, n, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    assert sizes(from_weights) == {(h, h, 4 * layers), (n, h, layers), (h, n, layers)}
    shutil.copy(tiny_bert / "config.json", tmp_path)
    assert sizes(read_linears(tmp_path)) == sizes(from_weights)
    assert sizes(read_linears(bert_artifact)) == sizes(from_weights)
    assert sum(len(each.names) for each in from_weights) == 6
    assert all((each.left_outputs, each.left_inputs) == (each.outputs, each.inputs) for each in from_weights)


def test_an_artifact_of_convolutions(tiny_bert: Path, tmp_path: Path) -> None:
    from export.pipeline import export

    export(tiny_bert, tmp_path / "conv", linear_form="conv")
    assert sizes(read_linears(tmp_path / "conv")) == sizes(read_linears(tiny_bert))


def test_conv1d_is_stored_the_other_way(tiny_gpt2: Path) -> None:
    config = json.loads((tiny_gpt2 / "config.json").read_text(encoding="utf-8"))
    h, layers = config["n_embd"], config["n_layer"]
    assert sizes(read_linears(tiny_gpt2)) == {
        (3 * h, h, layers), (h, h, layers), (4 * h, h, layers), (h, 4 * h, layers),
    }  # fmt: skip


def test_structured_removes_heads_and_neurons(tiny_bert: Path) -> None:
    config = json.loads((tiny_bert / "config.json").read_text(encoding="utf-8"))
    h, n, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    found = {
        (each.outputs, each.inputs, each.left_outputs, each.left_inputs): each.count
        for each in read_linears(tiny_bert, structured=0.5)
    }
    assert found == {
        (h, h, h // 2, h): 3 * layers,
        (h, h, h, h // 2): layers,
        (n, h, n // 2, h): layers,
        (h, n, h, n // 2): layers,
    }
    assert {each.left_outputs for each in read_linears(tiny_bert, structured=0.99)} >= {8}, "eight neurons stay"


def test_user_errors(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_linears(tmp_path)
    shutil.copytree(tiny_bert, tmp_path / "other")
    config = json.loads((tiny_bert / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    assert sum(each.count for each in read_linears(tmp_path / "other")) >= 12, "the generic rule"
    with pytest.raises(ModelError, match="a unheard_of, whose heads and neurons are not described"):
        read_linears(tmp_path / "other", structured=0.5)
    weights = tmp_path / "other" / "model.safetensors"
    for content in (b"\xff" * 8, weights.read_bytes()[:100], b"", b"\x02" + bytes(7) + b"{}" + b"rest"):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=r"not a whole safetensors file|no linear that could be pruned"):
            read_linears(tmp_path / "other")
    weights.unlink()
    with pytest.raises(ModelError, match="no model that transformers knows"):
        read_linears(tmp_path / "other")
