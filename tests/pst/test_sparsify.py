"""The three verbs on real (tiny) transformers: exact counts, exact merging, and every refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2ForSequenceClassification
from transformers.pytorch_utils import Conv1D

from pst.errors import ModelError, PatternError
from pst.masked_weight import FusedMaskedWeight, MaskedWeight
from pst.materialize import masked_weights
from pst.methods import Method
from pst.methods.magnitude import Magnitude
from pst.methods.pst import PST
from pst.patterns import parse_pattern
from pst.sparsify import PrunableWeight, merge_, prunable_weights, set_sparsity_, sparsify_

PATTERNS = [("unstructured", 0.9), ("2:4", 0.5), ("2:4", 0.2), ("block:4x4", 0.7)]
MODELS = ["bert", "gpt2"]
Load = Callable[[str], nn.Module]


@pytest.fixture
def load(tiny_bert: Path, tiny_gpt2: Path) -> Load:
    def load(name: str) -> nn.Module:
        loader, folder = {
            "bert": (BertForSequenceClassification, tiny_bert),
            "gpt2": (GPT2ForSequenceClassification, tiny_gpt2),
        }[name]
        model: nn.Module = loader.from_pretrained(folder).eval()
        return model

    return load


@torch.no_grad()
def move_(model: nn.Module) -> None:
    """Values as training would leave them, for the original weights too where they train."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def logits(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(5, 30, (3, 17), generator=generator)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def matrices(item: PrunableWeight) -> list[Tensor]:
    """The matrices of one weight as outputs x inputs: three for c_attn."""
    by_row = item.weight.detach() if item.axis == 1 else item.weight.detach().T
    return list(by_row.chunk(item.parts, 0))


# -- attaching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_attaching_changes_no_output(load: Load, name: str) -> None:
    model, plain = load(name), load(name)
    weights = sparsify_(model)
    assert {item.name for item in weights} == {item.name for item in prunable_weights(plain)}
    assert len(weights) == {"bert": 12, "gpt2": 8}[name]
    for item, other in zip(weights, prunable_weights(plain), strict=True):
        assert torch.equal(item.weight, other.weight)
    assert torch.equal(logits(model), logits(plain))
    set_sparsity_(model, 0.0)
    assert torch.equal(logits(model), logits(plain))


def test_names_are_those_of_the_plain_state_dict(load: Load) -> None:
    for name in MODELS:
        plain = load(name).state_dict()
        for item in sparsify_(load(name)):
            assert plain[item.name].shape == item.weight.shape


def test_the_generator_decides_the_start(load: Load) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = load("gpt2")
        sparsify_(model, generator=torch.Generator().manual_seed(seed))
        return {name: value for name, value in model.named_parameters() if name.endswith((".U", ".A"))}

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert len(one) == 2 * (2 * 6)  # q, k, v and three more matrices a layer
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_trainable_parameters_of_a_weight_are_n_plus_k_times_the_ranks(load: Load) -> None:
    model = load("gpt2")
    sparsify_(model, method=PST(r1=3, r2=5, faithful=True))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    matrices_of_a_layer = [(32, 32)] * 3 + [(32, 32), (128, 32), (32, 128)]
    assert trainable == 2 * sum((n + k) * (3 + 5 + 1) for n, k in matrices_of_a_layer)


# -- choosing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [PST(), PST(faithful=True, alpha="one"), Magnitude()])
def test_every_matrix_has_its_own_exact_count(load: Load, name: str, method: Method) -> None:
    model = load(name)
    weights = sparsify_(model, method=method)
    move_(model)
    for sparsity in (0.0, 0.123, 0.5, 0.9, 0.37):  # downwards too
        set_sparsity_(model, sparsity)
        found = [int((matrix == 0).sum()) for item in weights for matrix in matrices(item)]
        assert found == [int(matrix.numel() * sparsity) for item in weights for matrix in matrices(item)]
        assert len(found) == 12  # GPT-2's q, k and v one by one


def test_two_of_four_holds_along_the_inputs_of_every_weight(load: Load) -> None:
    for name in MODELS:
        model = load(name)
        weights = sparsify_(model, pattern=parse_pattern("2:4"))
        move_(model)
        set_sparsity_(model, 0.5)
        for item in weights:
            assert parse_pattern("2:4").holds(item.weight.detach().numpy(), axis=item.axis)
            assert int((item.weight == 0).sum()) * 2 == item.weight.numel()
        set_sparsity_(model, 0.2)
        for item in weights:
            for matrix in matrices(item):
                dense_groups = (matrix.reshape(-1, 4) != 0).all(1)
                assert int((~dense_groups).sum()) == int(matrix.numel() // 4 * (0.2 / 0.5))


def test_masks_are_those_of_the_scores(load: Load) -> None:
    model = load("gpt2")
    weights = sparsify_(model)
    move_(model)
    set_sparsity_(model, 0.8)
    for (module, attached), item in zip(masked_weights(model), weights, strict=True):
        original = module.get_parameter("parametrizations.weight.original")
        parts = list(attached.parts) if isinstance(attached, FusedMaskedWeight) else [attached]
        assert len(parts) == item.parts
        for part, piece in zip(parts, original.chunk(item.parts, dim=1 - item.axis), strict=True):
            assert isinstance(part, MaskedWeight)
            expected = parse_pattern("unstructured").mask(part.scores(piece), 0.8, axis=1)
            assert torch.equal(part.mask, expected)
            assert float(part.sparsity) == 0.8


def test_conv1d_blocks_train_like_linear_ones() -> None:
    """A block of Conv1D with transposed weights: the same masks, outputs and gradients."""

    def block(kind: str) -> nn.Module:
        torch.manual_seed(0)
        linears = [nn.Linear(12, 20), nn.Linear(20, 8)]
        layers: list[nn.Module] = list(linears)
        if kind == "conv1d":
            layers = [Conv1D(linear.out_features, linear.in_features) for linear in linears]
            for layer, linear in zip(layers, linears, strict=True):
                layer.weight.data = linear.weight.data.T.contiguous()
                layer.bias.data = linear.bias.data.clone()
        named = nn.ModuleDict({"first": layers[0], "act": nn.Tanh(), "second": layers[1]})
        return nn.ModuleDict({"blocks": nn.ModuleList([named])}).double()

    def run(kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        model: Any = block(kind)
        assert len(sparsify_(model, pattern="2:4", generator=torch.Generator().manual_seed(1))) == 2
        move_(model)
        set_sparsity_(model, 0.5)
        X = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        Y = model["blocks"][0]["second"](model["blocks"][0]["act"](model["blocks"][0]["first"](X)))
        Y.square().sum().backward()
        masks = [attached.mask for _, attached in masked_weights(model)]
        grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return [Y, *masks], grads

    expected, expected_grads = run("linear")
    found, found_grads = run("conv1d")
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    assert found_grads.keys() == expected_grads.keys()
    assert len(found_grads) == 2 * 6 + 2
    for name, grad in expected_grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-11, atol=1e-12)


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("method", [PST(r1=2, r2=3), Magnitude()])
def test_merging_is_exact(load: Load, tmp_path: Path, name: str, pattern: str, sparsity: float, method: Method) -> None:
    """Bit for bit, and still after the folder is written and read again."""
    model, plain = load(name), load(name)
    weights = sparsify_(model, method=method, pattern=pattern)
    move_(model)
    set_sparsity_(model, sparsity)
    before = logits(model)
    masked = {item.name: item.weight.detach().clone() for item in weights}
    assert not torch.equal(before, logits(plain))

    merge_(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not list(masked_weights(model))
    assert torch.equal(logits(model), before)
    state = model.state_dict()
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    for key, value in masked.items():
        assert torch.equal(state[key], value)
        assert state[key].is_contiguous()
        assert bool((value == 0).any())
        assert not torch.signbit(value[value == 0]).any()

    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(again), before)
    for item in prunable_weights(again):
        assert torch.equal(item.weight == 0, masked[item.name] == 0)
        if sparsity in (0.9, 0.5, 0.7):
            assert parse_pattern(pattern).holds(item.weight.detach().numpy(), axis=item.axis)


def test_untouched_weights_stay_as_they_were(load: Load) -> None:
    model, plain = load("bert"), load("bert").state_dict()
    names = {item.name for item in sparsify_(model)}
    set_sparsity_(model, 0.5)
    merge_(model)
    for key, value in model.state_dict().items():
        if key in names:
            kept = value != 0
            assert torch.equal(value[kept], plain[key][kept])  # the low-rank update was still zero
            assert int((~kept).sum()) * 2 == value.numel()
        else:
            assert torch.equal(value, plain[key])


def test_a_merged_model_can_be_sparsified_again(load: Load) -> None:
    model = load("gpt2")
    sparsify_(model)
    set_sparsity_(model, 0.5)
    merge_(model)
    before = logits(model)
    weights = sparsify_(model)
    assert torch.equal(logits(model), before)
    set_sparsity_(model, 0.75)
    assert all(int((item.weight == 0).sum()) * 4 == item.weight.numel() * 3 for item in weights)


def test_masks_travel_with_the_state_dict(load: Load) -> None:
    """A checkpoint of a sparsified model brings back masks and sparsity, not a dense start."""
    model, fresh = load("gpt2"), load("gpt2")
    for each in (model, fresh):
        sparsify_(each, pattern="2:4")
    move_(model)
    set_sparsity_(model, 0.3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    saved = {float(value) for key, value in fresh.state_dict().items() if key.endswith(".sparsity")}
    assert saved == {0.3}


# -- refusals ------------------------------------------------------------------------------------------------------


def test_nothing_prunable_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ModelError, match="has no prunable weight"):
        sparsify_(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sparsifying_twice_is_refused(load: Load) -> None:
    model = load("bert")
    sparsify_(model)
    with pytest.raises(ModelError, match="sparsified already; call merge_"):
        sparsify_(model)


def test_verbs_out_of_order_are_refused(load: Load) -> None:
    model = load("bert")
    with pytest.raises(ModelError, match="no masks; call sparsify_ first"):
        set_sparsity_(model, 0.5)
    with pytest.raises(ModelError, match="no masks to merge; call sparsify_ first"):
        merge_(model)
    sparsify_(model)
    merge_(model)
    with pytest.raises(ModelError, match="call sparsify_ first"):
        set_sparsity_(model, 0.5)


@pytest.mark.parametrize("sparsity", [-0.01, 1.0, 2.0, float("nan")])
def test_sparsity_outside_the_range_is_refused(load: Load, sparsity: float) -> None:
    model = load("bert")
    weights = sparsify_(model)
    set_sparsity_(model, 0.5)
    with pytest.raises(PatternError, match=r"outside \[0, 1\)"):
        set_sparsity_(model, sparsity)
    assert int((weights[0].weight == 0).sum()) == 512


def test_more_than_the_pattern_holds_is_refused(load: Load) -> None:
    model = load("bert")
    sparsify_(model, pattern="2:4")
    with pytest.raises(PatternError, match=r"Pattern 2:4 has sparsity 0\.5; 0\.9 was asked for"):
        set_sparsity_(model, 0.9)


@pytest.mark.parametrize(("pattern", "message"), [("3:5", "5 does not divide"), ("block:5x1", "5x1 do not cover")])
def test_a_weight_that_the_pattern_does_not_fit_is_named_and_nothing_changes(
    load: Load, pattern: str, message: str
) -> None:
    for name, weight in (("bert", r"bert\.encoder\.layer\.0\.attention\.self\.query\.weight"),
                         ("gpt2", r"transformer\.h\.0\.attn\.c_attn\.weight")):  # fmt: skip
        model = load(name)
        with pytest.raises(PatternError, match=rf"^{weight} has .*{message}"):
            sparsify_(model, pattern=pattern)
        assert not list(masked_weights(model))
        assert all(parameter.requires_grad for parameter in model.parameters())
        sparsify_(model, pattern="2:4")


def test_only_the_axis_that_a_product_sums_over_must_be_divisible() -> None:
    config = BertConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=30)
    with pytest.raises(PatternError, match=r"layer\.0\.output\.dense\.weight has 30 weights along its input axis"):
        sparsify_(BertForSequenceClassification(config), pattern="2:4")
    narrow = GPT2Config(vocab_size=9, n_embd=30, n_layer=1, n_head=2, n_positions=8, n_inner=32)
    with pytest.raises(PatternError, match=r"h\.0\.attn\.c_attn\.weight has 30 weights along its input axis"):
        sparsify_(GPT2ForSequenceClassification(narrow), pattern="2:4")


def test_an_unknown_pattern_is_refused(load: Load) -> None:
    with pytest.raises(PatternError, match="Unknown pattern 'foo'"):
        sparsify_(load("bert"), pattern="foo")


def test_scores_that_overflow_name_the_weight_and_the_remedy(load: Load) -> None:
    model = load("gpt2")
    sparsify_(model)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.parametrizations.weight.0.R")[0] = float("nan")
    with pytest.raises(
        ModelError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight hold NaN or infinity.*lower learning rate"
    ):
        set_sparsity_(model, 0.5)


def test_a_model_without_a_head_is_fine() -> None:
    config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    assert len(sparsify_(BertModel(config))) == 6
