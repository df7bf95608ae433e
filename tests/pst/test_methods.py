"""Which tensors each method trains and at which rate, and whole training steps against the oracle's layers."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification, BertModel, GPT2ForSequenceClassification

from pst import methods
from pst.config import TrainConfig
from pst.errors import ConfigError
from pst.masked_weight import MaskedLowRank
from pst.materialize import masked_weights
from pst.methods import Method
from pst.methods.magnitude import Magnitude
from pst.methods.pst import PST
from pst.schedule import CubicSchedule
from pst.sparsify import merge_, set_sparsity_, sparsify_
from tests.pst.oracle import NAMES, Net, OracleLinear, keep_blocks, keep_highest, keep_n_of_m

LOW_RANK = tuple(f".{name}" for name in NAMES)


def bert(tiny_bert: Path) -> nn.Module:
    model: nn.Module = BertForSequenceClassification.from_pretrained(tiny_bert)
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- what trains ---------------------------------------------------------------------------------------------------


def test_pst_trains_head_pooler_layer_norm_and_biases(tiny_bert: Path) -> None:
    plain = bert(tiny_bert)
    model = bert(tiny_bert)
    pruned = {item.name for item in sparsify_(model, method=PST())}
    found = trainable(model)
    expected = {
        name
        for name, _ in plain.named_parameters()
        if name.endswith(".bias") or "LayerNorm" in name or name.startswith(("classifier.", "bert.pooler."))
    }
    assert {name for name in found if ".parametrizations." not in name} == expected
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.LayerNorm.weight"} <= expected
    low_rank = {name for name in found if ".parametrizations." in name}
    assert len(low_rank) == 6 * len(pruned)
    assert all(name.endswith(LOW_RANK) for name in low_rank)
    assert not any("embeddings.weight" in name for name in found)


def test_pst_trains_the_score_of_gpt2_and_not_its_embeddings(tiny_gpt2: Path) -> None:
    model = GPT2ForSequenceClassification.from_pretrained(tiny_gpt2)
    sparsify_(model)
    dense = {name for name in trainable(model) if ".parametrizations." not in name}
    assert "score.weight" in dense
    assert "transformer.ln_f.weight" in dense
    assert not any("wte" in name or "wpe" in name for name in dense)
    assert {name for name in dense if not name.endswith("bias") and ".ln_" not in name} == {"score.weight"}


def test_a_base_without_a_head_keeps_its_embeddings_frozen(tiny_bert: Path) -> None:
    model = BertModel.from_pretrained(tiny_bert)
    sparsify_(model)
    dense = {name for name in trainable(model) if ".parametrizations." not in name}
    matrices = {name for name in dense if model.get_parameter(name).ndim == 2}
    assert matrices == {"pooler.dense.weight"}


def test_faithful_trains_the_low_rank_tensors_alone(tiny_bert: Path) -> None:
    model = bert(tiny_bert)
    weights = sparsify_(model, method=PST(faithful=True, alpha="one"))
    assert len(trainable(model)) == 6 * len(weights)
    assert all(name.endswith(LOW_RANK) for name in trainable(model))


def test_magnitude_trains_everything(tiny_bert: Path) -> None:
    model = bert(tiny_bert)
    sparsify_(model, method=Magnitude())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(list(model.parameters())) == len(list(bert(tiny_bert).parameters()))


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        (PST(lr=1.0, lr_update=2.0, lr_scores=3.0), {1.0, 2.0, 3.0}),
        (PST(lr=1.0, lr_update=2.0, lr_scores=3.0, faithful=True), {2.0, 3.0}),
        (Magnitude(lr=4.0), {4.0}),
    ],
)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_each_trainable_parameter_is_in_one_group_at_its_rate(
    tiny_bert: Path, tiny_gpt2: Path, name: str, method: Method, rates: set[float]
) -> None:
    model = bert(tiny_bert) if name == "bert" else GPT2ForSequenceClassification.from_pretrained(tiny_gpt2)
    sparsify_(model, method=method)
    groups = method.param_groups(model)
    assert {group["lr"] for group in groups} == rates
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = full_name.rsplit(".", 1)[-1] if ".parametrizations." in full_name else ""
        expected = 2.0 if leaf in ("U", "V") else 3.0 if leaf in ("A", "B", "R", "C") else 1.0
        assert rate[id(parameter)] == (4.0 if isinstance(method, Magnitude) else expected), full_name


def test_frozen_tensors_gather_no_gradient(tiny_bert: Path) -> None:
    model = bert(tiny_bert)
    sparsify_(model, method=PST(faithful=True))
    set_sparsity_(model, 0.5)
    model(input_ids=torch.tensor([[2, 6, 7, 3]]), labels=torch.tensor([1])).loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == trainable(model)


# -- scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_alpha_is_the_mean_of_the_weight_or_one(axis: int) -> None:
    weight = torch.randn(6, 10) * 0.04
    attached = PST(beta=0.5).masked_weight(weight, axis=axis)
    assert attached.scales.alpha1 == attached.scales.alpha2 == pytest.approx(float(weight.abs().mean()))
    assert attached.scales.beta == 0.5
    assert not attached.scales.magnitude_gradient
    published = PST(alpha="one", faithful=True, r1=3, r2=4).masked_weight(weight, axis=axis)
    assert published.scales.alpha1 == published.scales.alpha2 == published.scales.beta == 1.0
    assert published.scales.magnitude_gradient
    assert (published.A.shape[1], published.U.shape[1]) == (3, 4)


def test_each_matrix_of_a_fused_weight_has_its_own_alpha(tiny_gpt2: Path) -> None:
    model = GPT2ForSequenceClassification.from_pretrained(tiny_gpt2)
    stored = model.transformer.h[0].attn.c_attn.weight.detach()
    with torch.no_grad():
        stored[:, :32] *= 10
    sparsify_(model, method=PST())
    _, fused = next(masked_weights(model))
    found = [part.scales.alpha1 for part in fused.parts]  # type: ignore[union-attr]
    assert found == pytest.approx([float(piece.abs().mean()) for piece in stored.chunk(3, 1)])


# -- training against the oracle -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x2"])
@pytest.mark.parametrize("faithful", [False, True])
def test_training_steps_equal_the_oracle(pattern: str, faithful: bool) -> None:
    """Eight AdamW steps along the schedule in double precision, then every tensor and the merged weights."""
    final = 0.5 if pattern == "2:4" else 0.8
    schedule = CubicSchedule(initial=final if pattern == "2:4" else 0.0, final=final, steps=8)
    rates: dict[str, float] = {"lr": 2e-2, "lr_update": 3e-2, "lr_scores": 5e-2}
    method = PST(r1=3, r2=2, beta=0.7, faithful=faithful, alpha="one" if faithful else "mean", **rates)  # type: ignore[arg-type]
    torch.manual_seed(0)
    ours = Net(lambda _, inputs, outputs: nn.Linear(inputs, outputs)).double()
    plain = {name: value.clone() for name, value in ours.state_dict().items()}
    weights = sparsify_(ours, method=method, pattern=pattern)
    assert len(weights) == 4
    attached = dict(zip((item.name for item in weights), (found for _, found in masked_weights(ours)), strict=True))

    def oracle_layer(name: str, inputs: int, outputs: int) -> OracleLinear:
        W0, twin = plain[f"{name}.weight"], attached[f"{name}.weight"]
        assert isinstance(twin, MaskedLowRank)
        alpha = 1.0 if faithful else float(W0.abs().mean())
        tensors = {each: twin.get_parameter(each) for each in NAMES}
        keep = partial(keep_n_of_m, n=2, m=4)
        return OracleLinear(W0, plain[f"{name}.bias"], tensors, keep=keep, alpha1=alpha, alpha2=alpha, beta=0.7,
                            magnitude_gradient=faithful)  # fmt: skip

    theirs = Net(oracle_layer).double()
    theirs.load_state_dict({name: value for name, value in plain.items() if ".weight" not in name or "norm" in name
                            or "classifier" in name}, strict=False)  # fmt: skip
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in theirs.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "W0" or (faithful and leaf not in NAMES):
            continue
        rate = rates["lr_update"] if leaf in "UV" else rates["lr_scores"] if leaf in "ABRC" else rates["lr"]
        groups.setdefault(rate, []).append(parameter)
    options: dict[str, Any] = {"weight_decay": 0.02}
    our_optimizer = torch.optim.AdamW(method.param_groups(ours), **options)
    their_optimizer = torch.optim.AdamW([{"params": group, "lr": rate} for rate, group in groups.items()], **options)

    generator = torch.Generator().manual_seed(1)
    chosen = []
    for step in range(8):
        X = torch.randn(5, 12, dtype=torch.float64, generator=generator)
        labels = torch.randint(3, (5,), generator=generator)
        set_sparsity_(ours, schedule(step))
        if pattern != "2:4":
            keep = keep_highest if pattern == "unstructured" else partial(keep_blocks, rows=2, columns=2)
            for layer in theirs.modules():
                if isinstance(layer, OracleLinear):
                    layer.keep = partial(keep, sparsity=schedule(step))
        losses = []
        for net, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(X), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        chosen.append(torch.cat([found.get_buffer("mask").flatten() for found in attached.values()]))
    assert not torch.equal(chosen[-2], chosen[-1])  # the masks moved while the sparsity stood still

    our_state = dict(ours.named_parameters())
    for layer_name, twin in attached.items():
        layer = theirs.get_submodule(layer_name.removesuffix(".weight"))
        for name in NAMES:
            torch.testing.assert_close(twin.get_parameter(name), layer.get_parameter(name), rtol=1e-9, atol=1e-11)
    for name, parameter in theirs.named_parameters():
        if name.rsplit(".", 1)[-1] in ("weight", "bias"):
            torch.testing.assert_close(our_state[name], parameter, rtol=1e-9, atol=1e-11)
            assert torch.equal(our_state[name], plain[name]) == faithful
    set_sparsity_(ours, final)
    merge_(ours)
    for layer_name in attached:
        layer = theirs.get_submodule(layer_name.removesuffix(".weight"))
        assert isinstance(layer, OracleLinear)
        torch.testing.assert_close(ours.get_parameter(layer_name), layer.masked(), rtol=1e-9, atol=1e-11)


# -- by name -------------------------------------------------------------------------------------------------------


def test_methods_are_found_by_their_files() -> None:
    assert {"dense", "fixed_mask", "magnitude", "movement", "pst", "soft_movement"} == set(methods.names())
    config = TrainConfig(model="m", data="d", sparsity=0.9, lr=0.25, lr_update=0.5, lr_scores=0.75, r1=3, r2=4,
                         alpha="one", beta=2.0).filled()  # fmt: skip
    assert methods.make("dense", config) is None
    assert methods.make("magnitude", config) == Magnitude(lr=0.25)
    assert methods.make("pst", config) == PST(
        r1=3, r2=4, alpha="one", beta=2.0, lr=0.25, lr_update=0.5, lr_scores=0.75, faithful=False
    )


@pytest.mark.parametrize("name", ["no-such", "", "__init__", "pst.methods.pst", "Pst"])
def test_an_unknown_method_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"Unknown method '{name}'; use one of dense, .*pst"):
        methods.make(name, SimpleNamespace())
