"""A sparse model that learns another task: its zeros before, while and after, its training against plain layers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification

from pst.errors import ModelError, PatternError
from pst.materialize import masked_weights
from pst.methods.fixed_mask import FixedMask, MaskedUpdate, settled
from pst.methods.magnitude import Magnitude
from pst.patterns import parse_pattern
from pst.sparsify import merge_, prunable_weights, set_sparsity_, sparsify_
from tests.pst.oracle import Net

PATTERNS = [("unstructured", 0.9), ("2:4", 0.5), ("4:8", 0.5), ("block:4x4", 0.7)]
Load = Callable[..., nn.Module]


@pytest.fixture
def load(tiny_bert: Path, tiny_gpt2: Path) -> Load:
    def load(name: str, pattern: str = "", sparsity: float = 0.0) -> nn.Module:
        """The model, pruned by magnitude where a pattern is given."""
        loader, folder = {
            "bert": (BertForSequenceClassification, tiny_bert),
            "gpt2": (GPT2ForSequenceClassification, tiny_gpt2),
        }[name]
        model: nn.Module = loader.from_pretrained(folder).eval()
        if pattern:
            sparsify_(model, method=Magnitude(), pattern=pattern)
            set_sparsity_(model, sparsity)
            merge_(model)
        return model

    return load


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(5, 30, (3, 17), generator=torch.Generator().manual_seed(4))
    found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def train(model: nn.Module, method: FixedMask, steps: int) -> None:
    optimizer = torch.optim.AdamW(method.param_groups(model), weight_decay=0.01)
    for step in range(steps):
        set_sparsity_(model, 0.3 * step / steps)  # a schedule that means nothing here
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model), torch.tensor([0, 1, 1])).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_every_zero_outlives_training_and_merging(
    load: Load, tmp_path: Path, name: str, pattern: str, sparsity: float
) -> None:
    model = load(name, pattern, sparsity)
    before = {item.name: item.weight.detach().clone() for item in prunable_weights(model)}
    start = logits(model)
    method = FixedMask(lr=1e-2, lr_update=1e-2, r2=4)
    sparsify_(model, method=method, pattern=pattern)
    assert torch.equal(logits(model), start)
    masks = [part.mask.clone() for part in model.modules() if isinstance(part, MaskedUpdate)]
    train(model, method, 8)
    for chosen in (0.0, 0.99):  # outside of what 2:4 can hold, too
        set_sparsity_(model, chosen)
        set_sparsity_(model, chosen, budget="local")
        set_sparsity_(model, chosen, budget="global")
    after = [part.mask for part in model.modules() if isinstance(part, MaskedUpdate)]
    assert len(masks) == 12
    for part in model.modules():
        if isinstance(part, MaskedUpdate):
            assert float(part.sparsity) == pytest.approx(sparsity, abs=0.02)
    assert all(torch.equal(one, other) for one, other in zip(masks, after, strict=True))
    trained = logits(model).detach()
    merge_(model)
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    assert torch.equal(logits(again), trained)
    for item in prunable_weights(again):
        weight, old = item.weight.detach(), before[item.name]
        assert torch.equal(weight == 0, old == 0)
        assert not torch.signbit(weight[weight == 0]).any()
        moved = float((weight != old)[old != 0].double().mean())
        assert moved > 0.95  # what was not zero, but for queries whose keys are all zeros: they have hardly a gradient
        for matrix in item.matrices():
            assert parse_pattern(pattern).holds(matrix.numpy(), axis=item.axis)


def test_training_steps_equal_plain_layers() -> None:
    """Six AdamW steps against M * (W0 + beta U V) written out, in double precision."""

    class Layer(nn.Module):
        def __init__(self, W0: Tensor, bias: Tensor, twin: MaskedUpdate) -> None:
            super().__init__()
            self.W0, self.bias = W0, nn.Parameter(bias.clone())
            self.U, self.V = (nn.Parameter(each.detach().clone()) for each in (twin.U, twin.V))

        def weight(self) -> Tensor:
            return (self.W0 != 0) * (self.W0 + 0.7 * self.U @ self.V)

        def forward(self, X: Tensor) -> Tensor:
            return X @ self.weight().T + self.bias

    torch.manual_seed(0)
    ours = Net(lambda _, inputs, outputs: nn.Linear(inputs, outputs)).double()
    sparsify_(ours, method=Magnitude())
    set_sparsity_(ours, 0.6)
    merge_(ours)
    plain = {name: value.clone() for name, value in ours.state_dict().items()}
    method = FixedMask(r2=3, beta=0.7, lr=2e-2, lr_update=3e-2)
    names = [item.name for item in sparsify_(ours, method=method)]
    twins = dict(zip(names, (attached for _, attached in masked_weights(ours)), strict=True))

    def layer(name: str, inputs: int, outputs: int) -> nn.Module:
        twin = twins[f"{name}.weight"]
        assert isinstance(twin, MaskedUpdate)
        return Layer(plain[f"{name}.weight"], plain[f"{name}.bias"], twin)

    theirs = Net(layer).double()
    theirs.load_state_dict({name: value for name, value in plain.items() if name not in names}, strict=False)
    update = [value for name, value in theirs.named_parameters() if name.endswith((".U", ".V"))]
    rest = [value for name, value in theirs.named_parameters() if not name.endswith((".U", ".V"))]
    optimizers = [
        torch.optim.AdamW(method.param_groups(ours)),
        torch.optim.AdamW([{"params": update, "lr": 3e-2}, {"params": rest, "lr": 2e-2}]),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        X = torch.randn(5, 12, dtype=torch.float64, generator=generator)
        labels = torch.randint(3, (5,), generator=generator)
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    merge_(ours)
    merged = ours.state_dict()
    for name in names:
        other = theirs.get_submodule(name.removesuffix(".weight"))
        assert isinstance(other, Layer)
        torch.testing.assert_close(merged[name], other.weight(), rtol=1e-9, atol=1e-11)
        assert not torch.equal(merged[name], plain[name])
    for name, value in theirs.named_parameters():
        if not name.endswith((".U", ".V")):
            torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-11)
            assert not torch.equal(merged[name], plain[name])


def test_what_trains(load: Load) -> None:
    model = load("bert", "2:4", 0.5)
    count = len(sparsify_(model, method=FixedMask(r2=3), pattern="2:4"))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len([name for name in trained if name.endswith((".0.U", ".0.V"))]) == 2 * count
    assert not any(name.endswith(("original", "embeddings.weight")) for name in trained)
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.embeddings.LayerNorm.bias"} <= trained
    assert len(trained) < sum(1 for _ in model.parameters())
    update, rest = FixedMask(lr=1.0, lr_update=2.0).param_groups(model)
    assert (update["lr"], rest["lr"]) == (2.0, 1.0)
    assert len(update["params"]) == 2 * count
    assert len(update["params"]) + len(rest["params"]) == len(trained)


def test_only_the_small_tensors_and_the_mask_are_held_for_the_backward_pass() -> None:
    weight = torch.randn(40, 30).where(torch.rand(40, 30) < 0.5, 0.0)
    attached = MaskedUpdate(weight, axis=1, r2=3, beta=1.0)
    held: list[Tensor] = []

    def hold(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        attached.masked(weight)
    assert {tensor.data_ptr() for tensor in held if tensor.numel() == weight.numel()} <= {attached.mask.data_ptr()}


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_model_without_zeros_is_refused_and_left_alone(load: Load, name: str, pattern: str) -> None:
    model = load(name)
    with pytest.raises(ModelError, match=r"no zeros in its prunable weights.*Give a sparse model.*such as pst"):
        sparsify_(model, method=FixedMask(), pattern=pattern)
    assert not list(masked_weights(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    sparsify_(model)


def test_zeros_that_do_not_follow_the_pattern_are_refused(load: Load) -> None:
    model = load("gpt2", "unstructured", 0.6)
    with pytest.raises(PatternError, match=r"zeros of transformer\.h\.0\.attn\.c_attn\.weight do not follow pattern"):
        sparsify_(model, method=FixedMask(), pattern="2:4")
    assert all(parameter.requires_grad for parameter in model.parameters())
    sparsify_(model, method=FixedMask())


def test_a_weight_that_is_dense_beside_sparse_ones_stays_dense(load: Load) -> None:
    model, dense = load("bert", "unstructured", 0.8), load("bert")
    first, *others = prunable_weights(model)
    first.module.weight = nn.Parameter(prunable_weights(dense)[0].weight.detach().clone())
    sparsify_(model, method=FixedMask())
    set_sparsity_(model, 0.8)
    assert not (first.weight == 0).any()
    assert all(int((item.weight == 0).sum()) == int(0.8 * item.weight.numel()) for item in others)


# -- what a run calls its pattern ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), *PATTERNS[1:3]])
def test_pattern_and_sparsity_are_found_in_the_weights(load: Load, name: str, pattern: str, sparsity: float) -> None:
    found = settled(load(name, pattern, sparsity), pattern="unstructured")
    assert found["pattern"] == pattern
    assert found["sparsity"] == found["sparsity_initial"] == pytest.approx(sparsity, abs=0.01)


def test_what_the_folder_says_goes_before_a_guess_where_it_is_true(load: Load, tmp_path: Path) -> None:
    model = load("gpt2", "block:4x4", 0.75)
    assert settled(model, pattern="unstructured", source=str(tmp_path))["pattern"] == "unstructured"
    for text in ("", "{", "[]", '{"pattern": 3}', '{"pattern": "dense"}', "{}", '{"pattern": "2:4"}'):
        (tmp_path / "sparsity.json").write_text(text)
        assert settled(model, pattern="unstructured", source=str(tmp_path))["pattern"] == "unstructured"
    (tmp_path / "sparsity.json").write_text(json.dumps({"pattern": "block:4x4"}))
    assert settled(model, pattern="unstructured", source=str(tmp_path))["pattern"] == "block:4x4"
    assert settled(model, pattern="block:2x2", source=str(tmp_path))["pattern"] == "block:2x2"  # the user's word


def test_a_dense_model_has_no_pattern(load: Load) -> None:
    found = settled(load("bert"), pattern="unstructured")
    assert found == {"pattern": "unstructured", "sparsity": 0.0, "sparsity_initial": 0.0}
