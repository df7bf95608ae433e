"""Which weights each architecture gives to pruning, on full-size models without memory (the meta device)."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pst.errors import ModelError
from pst.models import architecture
from pst.sparsify import prunable_weights


def on_meta(model_class: type[nn.Module], config: object) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


def test_bert_base_has_72_weights_of_85_million() -> None:
    weights = prunable_weights(on_meta(BertForSequenceClassification, BertConfig()))
    assert len(weights) == 72
    assert {(item.axis, item.parts) for item in weights} == {(1, 1)}
    kinds = Counter(item.name.split(".", 4)[4] for item in weights)
    assert kinds == {
        "attention.self.query.weight": 12,
        "attention.self.key.weight": 12,
        "attention.self.value.weight": 12,
        "attention.output.dense.weight": 12,
        "intermediate.dense.weight": 12,
        "output.dense.weight": 12,
    }
    assert sum(item.weight.numel() for item in weights) == 84_934_656
    assert sum(sum(item.weight.shape) * (8 + 8 + 1) for item in weights) == 2_820_096  # the published 2.82M


def test_gpt2_is_stored_inputs_by_outputs_with_q_k_v_side_by_side() -> None:
    weights = prunable_weights(on_meta(GPT2ForSequenceClassification, GPT2Config()))
    assert len(weights) == 48
    assert {item.axis for item in weights} == {0}
    found = {item.name: (tuple(item.weight.shape), item.parts) for item in weights if ".h.11." in item.name}
    assert found == {
        "transformer.h.11.attn.c_attn.weight": ((768, 2304), 3),
        "transformer.h.11.attn.c_proj.weight": ((768, 768), 1),
        "transformer.h.11.mlp.c_fc.weight": ((768, 3072), 1),
        "transformer.h.11.mlp.c_proj.weight": ((3072, 768), 1),
    }


@pytest.mark.parametrize(
    ("model_class", "config", "count"),
    [
        (RobertaForSequenceClassification, RobertaConfig(), 72),
        (DistilBertForSequenceClassification, DistilBertConfig(), 36),
    ],
)
def test_models_without_a_file_prune_their_numbered_blocks(
    model_class: type[nn.Module], config: object, count: int
) -> None:
    weights = prunable_weights(on_meta(model_class, config))
    assert len(weights) == count
    assert all(".layer." in item.name for item in weights)
    assert not any(word in item.name for item in weights for word in ("embed", "classifier", "pooler", "norm"))


@pytest.mark.parametrize(
    ("name", "prunable"),
    [
        ("bert.encoder.layer.3.attention.self.query", True),
        ("encoder.layer.11.output.dense", True),
        ("bert.pooler.dense", False),
        ("bert.encoder.layer.3.output.LayerNorm", False),
        ("bert.encoder.layer.3.crossattention.self.query", False),
        ("classifier", False),
    ],
)
def test_names_in_bert(name: str, prunable: bool) -> None:
    assert bool(architecture("bert").prunable.search(name)) is prunable


@pytest.mark.parametrize(
    ("name", "prunable", "parts"),
    [
        ("transformer.h.0.attn.c_attn", True, 3),
        ("h.0.attn.c_proj", True, 1),
        ("h.0.mlp.c_fc", True, 1),
        ("transformer.h.0.ln_1", False, 1),
        ("transformer.wte", False, 1),
        ("score", False, 1),
    ],
)
def test_names_in_gpt2(name: str, prunable: bool, parts: int) -> None:
    rules = architecture("gpt2")
    assert bool(rules.prunable.search(name)) is prunable
    assert rules.parts(name) == parts
    assert rules.axis == 0


@pytest.mark.parametrize("model_type", ["generic", "no-such-model", "", "../bert", "os.path"])
def test_an_unknown_type_gets_the_generic_rule(model_type: str) -> None:
    rules = architecture(model_type)
    assert rules is architecture("generic")
    assert rules.parts("layers.0.attn.c_attn") == 1


def test_own_rules_may_be_brought() -> None:
    model = on_meta(GPT2ForSequenceClassification, GPT2Config(n_layer=1))
    weights = prunable_weights(model, rules=architecture("generic"))
    assert {item.parts for item in weights} == {1}


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1)})])}),
    ],
)
def test_a_model_without_a_prunable_weight_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=rf"class {type(model).__name__}\) has no prunable weight"):
        prunable_weights(model)
