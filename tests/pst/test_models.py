"""Which weights each architecture gives to pruning, on full-size models without memory (the meta device)."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    MPNetForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from pst.errors import ModelError
from pst.models import architecture
from pst.sparsify import prunable_weights

BERT_NAMES = (
    "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
    "output.dense"
)


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
    ("model_class", "config", "count", "names"),
    [
        (RobertaForSequenceClassification, RobertaConfig(), 72, BERT_NAMES),
        (ElectraForSequenceClassification, ElectraConfig(), 72, BERT_NAMES),
        (DistilBertForSequenceClassification, DistilBertConfig(), 36,
         "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2"),
        (MPNetForSequenceClassification, MPNetConfig(), 72,
         "attention.attn.q attention.attn.k attention.attn.v attention.attn.o intermediate.dense output.dense"),
        (LlamaForCausalLM, LlamaConfig(num_hidden_layers=4, num_key_value_heads=8), 28,
         "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"),
    ],
)  # fmt: skip
def test_all_linears_of_a_layer_in_order(model_class: type[nn.Module], config: Any, count: int, names: str) -> None:
    weights = prunable_weights(on_meta(model_class, config))
    assert len(weights) == count
    assert {(item.axis, item.parts) for item in weights} == {(1, 1)}
    layer = [item.name for item in weights if re.search(r"layers?\.2\.", item.name)]
    assert [re.sub(r"^.*\.2\.(.*)\.weight$", r"\1", name) for name in layer] == names.split()
    assert architecture(config.model_type) is not architecture("generic")


@pytest.mark.parametrize(
    ("model_class", "config", "count"),
    [
        (XLMRobertaForSequenceClassification, XLMRobertaConfig(), 72),
        (DebertaV2ForSequenceClassification, DebertaV2Config(), 144),
    ],
)
def test_models_without_a_file_prune_their_numbered_blocks(
    model_class: type[nn.Module], config: Any, count: int
) -> None:
    assert architecture(config.model_type) is architecture("generic")
    weights = prunable_weights(on_meta(model_class, config))
    assert len(weights) == count
    assert all(".layer." in item.name for item in weights)
    assert not any(word in item.name for item in weights for word in ("embed", "classifier", "pooler", "norm"))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("distilbert", "pre_classifier"),
        ("distilbert", "distilbert.embeddings.word_embeddings"),
        ("mpnet", "mpnet.encoder.relative_attention_bias"),
        ("mpnet", "mpnet.encoder.layer.0.attention.attn.bias"),
        ("electra", "electra.embeddings_project"),
        ("electra", "discriminator_predictions.dense"),
        ("roberta", "classifier.out_proj"),
        ("llama", "lm_head"),
        ("llama", "model.embed_tokens"),
        ("llama", "model.layers.0.input_layernorm"),
    ],
)
def test_what_stays_dense(model_type: str, name: str) -> None:
    assert not architecture(model_type).prunable.search(name)


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
