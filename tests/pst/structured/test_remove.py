"""Removing units changes no output, in every architecture; what is left is smaller, saved and opened again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import pst
from pst.errors import ModelError, PatternError
from pst.methods.magnitude import Magnitude
from pst.methods.pst import PST
from pst.patterns.structured import Structured
from pst.sparsify import merge_, prunable_weights, set_sparsity_, sparsify_
from pst.structured.remove import remove_units_
from pst.structured.storage import from_pretrained, load_structured
from pst.structured.units import find_units, shape_of
from tests.decoders import make_decoder
from tests.pst.structured.models import ARCHITECTURES, logits, make, move_

CLASSIFIER = "AutoModelForSequenceClassification"


def pruned(folder: Path, sparsity: float = 0.5, *, method: Any = None, budget: Any = None, **options: Any) -> Any:
    """The model of *folder* after something like training, pruned and merged."""
    model = from_pretrained(CLASSIFIER, folder).eval()
    sparsify_(model, method=method or PST(), pattern=Structured(multiple=1, **options))
    move_(model)
    set_sparsity_(model, sparsity, budget=budget)
    merge_(model)
    return model


def uneven(folder: Path) -> Any:
    """The model of *folder* with the first head of its first layer gone, and the first 24 and 40 of its neurons."""
    model = from_pretrained(CLASSIFIER, folder).eval()
    units = find_units(model)
    first = [1, 24, 0, 40]
    remove_units_(model, [torch.arange(one.count) >= gone for one, gone in zip(units, first, strict=True)])
    return model


@pytest.mark.parametrize("method", [PST(), Magnitude()], ids=["pst", "magnitude"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_outputs_before_and_after_are_equal(tmp_path: Path, model_type: str, method: Any) -> None:
    model = from_pretrained(CLASSIFIER, make(tmp_path, model_type)).eval()
    dense = logits(model)
    sparsify_(model, method=method, pattern=Structured(multiple=1))
    move_(model)
    set_sparsity_(model, 0.5)
    masked = logits(model)
    merge_(model)
    assert not torch.allclose(masked, dense, atol=1e-3)
    torch.testing.assert_close(logits(model), masked, atol=2e-5, rtol=2e-5)
    report, units = model.config.structured, find_units(model)
    assert report["macs"]["kept"] <= 0.5 * report["macs"]["dense"]
    assert report["macs"]["kept"] == sum(one.count * one.macs for one in units)
    biases = sum(
        one.count * member.width for one in units for member in one.producers if member.module.bias is not None
    )
    weights = sum(item.weight.numel() for item in prunable_weights(model))
    assert report["parameters"]["kept"] == weights + biases


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_residual_widths_stay_and_the_rest_is_smaller(tmp_path: Path, model_type: str) -> None:
    model = uneven(make(tmp_path, model_type))
    left = model.config.structured["layers"]
    for one in find_units(model):
        layer = left[one.layer]
        assert one.count == (len(layer["heads"]) if one.kind == "heads" else layer["neurons"])
        assert shape_of(one.consumer.module, one.consumer.axis)[0] == 32
        linears: list[Any] = [one.consumer.module, *(member.module for member in one.producers)]
        for linear in linears:
            conv = not isinstance(linear, nn.Linear)
            stated = (linear.nx, linear.nf) if conv else (linear.out_features, linear.in_features)
            assert stated == tuple(linear.weight.shape)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_saved_and_opened_again(tmp_path: Path, model_type: str) -> None:
    model = uneven(make(tmp_path / "dense", model_type))
    model.save_pretrained(tmp_path / "small")
    again = load_structured(tmp_path / "small")
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert again.config.structured == model.config.structured
    base = pst.load_structured(tmp_path / "small", "AutoModel")
    assert find_units(base)[0].count == find_units(model)[0].count
    with pytest.raises(RuntimeError):  # never with weights at random
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_neurons_alone_and_alike_open_in_auto_classes(tmp_path: Path, model_type: str) -> None:
    model = pruned(make(tmp_path / "dense", model_type), 0.15, kinds="neurons", budget="local")
    model.save_pretrained(tmp_path / "small")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(load_structured(tmp_path / "small")), logits(model))


def test_heads_of_llama_open_in_auto_classes_too(tmp_path: Path) -> None:
    model = pruned(make(tmp_path / "dense", "llama"), 0.5, budget="local")
    model.save_pretrained(tmp_path / "small")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    assert (plain.config.num_attention_heads, plain.config.num_key_value_heads, plain.config.head_dim) == (2, 1, 8)
    assert torch.equal(logits(plain), logits(model))


def test_units_of_a_smaller_model_go_too_and_keep_their_numbers(tmp_path: Path) -> None:
    first = pruned(make(tmp_path / "dense", "mpnet"), 0.4)
    first.save_pretrained(tmp_path / "first")
    second = pruned(tmp_path / "first", 0.4)
    second.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load_structured(tmp_path / "second")), logits(second))
    before, after = first.config.structured, second.config.structured
    assert after["macs"]["dense"] == before["macs"]["dense"]
    assert after["macs"]["kept"] <= 0.6 * before["macs"]["kept"]
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert set(new["heads"]) <= set(old["heads"])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_generates_as_before(tmp_path: Path, kind: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(make_decoder(tmp_path / "dense", kind)).eval()
    sparsify_(model, pattern=Structured(multiple=1))
    set_sparsity_(model, 0.5)
    ids = torch.tensor([[2, 7, 9, 11]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    masked = model.generate(ids, **options)
    merge_(model)
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(model.generate(ids, **options), masked)
    assert torch.equal(load_structured(tmp_path / "small", "AutoModelForCausalLM").generate(ids, **options), masked)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_an_architecture_without_a_layout_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "camembert", vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ModelError, match=r"type 'camembert' has its heads and neurons.*pst/models/<model_type>.py"):
        sparsify_(model, pattern="structured")
    sparsify_(model, pattern="unstructured")


def test_cross_attention_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    with pytest.raises(ModelError, match="cross-attention"):
        find_units(transformers.BertModel(config))


def test_a_mask_of_one_weight_is_no_structured_one() -> None:
    with pytest.raises(PatternError, match="no weight has by itself"):
        Structured().mask(torch.rand(4, 4), 0.5, axis=1)
    with pytest.raises(PatternError, match="structured_multiple is 0"):
        Structured(multiple=0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": None}, "does not say what is left"),
        ({"schema_version": 9}, "schema version 9"),
        ({"layers": [{"heads": [0], "neurons": 8}]}, "has 2 layers, but its config.json states what is left of 1"),
        ({"layers": [{"heads": [0, 9], "neurons": 8}] * 2}, r"states \[0, 9\] as what is left of the heads of layer 0"),
        ({"layers": [{"heads": [0], "neurons": 0}] * 2}, "states 0 as what is left of the neurons of layer 0"),
    ],
)
def test_damaged_configuration(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    pruned(make(tmp_path / "dense", "bert")).save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    content = json.loads(file.read_text())
    content["structured"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=match):
        load_structured(tmp_path / "small")


def test_folders_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_structured(tmp_path)
    pruned(make(tmp_path / "dense", "bert")).save_pretrained(tmp_path / "small")
    (tmp_path / "small" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot be opened by AutoModelForSequenceClassification"):
        load_structured(tmp_path / "small")
