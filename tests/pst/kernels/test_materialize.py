"""A whole model trained with the kernels is the model trained without them."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="the kernels need Triton")

from pst import kernels, materialize
from pst.masked_weight import MaskedWeight
from pst.materialize import groups_of, masked_weights, materialized
from pst.methods.pst import PST
from pst.sparsify import merge_, set_sparsity_, sparsify_
from tests.pst.oracle import NAMES

METHOD = PST(r1=3, r2=4, lr=1e-2, lr_update=1e-2, lr_scores=1e-1)
BATCH = {"input_ids": torch.randint(1, 50, (4, 20)), "labels": torch.tensor([0, 1, 1, 0])}


@pytest.fixture(autouse=True)
def float32_proper() -> Iterator[None]:
    """No TF32 in the plain path, so that the two can be compared closely."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = BertForSequenceClassification(config)
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = GPT2ForSequenceClassification(config)
    return model


def sparse(base: nn.Module, pattern: str, device: torch.device) -> nn.Module:
    model = copy.deepcopy(base)
    sparsify_(model, method=METHOD, pattern=pattern, generator=torch.Generator().manual_seed(1))
    return model.to(device).train()


def batch_on(device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in BATCH.items()}


def masks_of(model: nn.Module) -> list[Tensor]:
    return [part.mask for part in model.modules() if isinstance(part, MaskedWeight)]


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.7), ("2:4", 0.5), ("2:4", 0.3), ("block:4x4", 0.5)]
)
def test_training_is_the_same_with_the_kernels(make: Any, pattern: str, sparsity: float, device: torch.device) -> None:
    base, batch = make(), batch_on(device)
    found = []
    for use in (False, True):
        with kernels.forced(use):
            model = sparse(base, pattern, device)
            optimizer = torch.optim.AdamW(METHOD.param_groups(model))
            losses = []
            for _ in range(3):
                set_sparsity_(model, sparsity)
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            assert bool(groups_of(model)) is use
            model.eval()
            with torch.no_grad():
                before = model(**batch).logits
            masks = [mask.clone() for mask in masks_of(model)]
            merge_(model)
            with torch.no_grad():
                assert torch.equal(model(**batch).logits, before)
            found.append((losses, masks, before))
    (losses, masks, logits), (other_losses, other_masks, other_logits) = found
    assert other_losses == pytest.approx(losses, rel=1e-4)
    different = sum(int((one != other).sum()) for one, other in zip(masks, other_masks, strict=True))
    assert different <= 4  # scores that are equal but for rounding
    torch.testing.assert_close(other_logits, logits, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_each_weight_by_itself(device: torch.device) -> None:
    base, batch = bert(), batch_on(device)
    grads = []
    for use in (False, True):
        with kernels.forced(use):
            model = sparse(base, "unstructured", device)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(3)
                for name, parameter in model.named_parameters():
                    if name.rsplit(".", 1)[-1] in NAMES:
                        parameter.add_(torch.randn(parameter.shape, generator=generator).to(device), alpha=0.1)
            for part in model.modules():
                if isinstance(part, MaskedWeight):
                    part.mask.copy_(torch.rand(part.mask.shape, generator=generator) < 0.5)
            model(**batch).loss.backward()
            grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, fused = grads
    assert {name for name, grad in plain.items() if grad is not None} == {n for n, g in fused.items() if g is not None}
    for name, grad in plain.items():
        if grad is not None:
            mine = cast(Tensor, fused[name])
            assert float((mine - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-7, name


def test_a_weight_that_is_not_used_gets_a_gradient_of_zero(device: torch.device) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})])

        def forward(self, X: Tensor) -> Tensor:
            found: Tensor = cast(Any, self.layers[0])["used"](X)
            return found

    with kernels.forced(True):
        model = sparse(Pair(), "unstructured", device)
        model(torch.randn(3, 8, device=device)).sum().backward()
    idle = cast(Any, model).layers[0]["idle"].parametrizations.weight[0]
    assert torch.equal(idle.V.grad, torch.zeros_like(idle.V))
    used = cast(Any, model).layers[0]["used"].parametrizations.weight[0]
    assert used.V.grad.abs().sum() > 0


def test_masks_that_change_before_the_backward_pass_are_refused(device: torch.device) -> None:
    with kernels.forced(True):
        model = sparse(bert(), "unstructured", device)
        loss = model(**batch_on(device)).loss
        set_sparsity_(model, 0.5)
        with pytest.raises(RuntimeError, match="changed before the backward pass"):
            loss.backward()


def test_a_part_that_is_called_alone_makes_its_own_weights(device: torch.device) -> None:
    with kernels.forced(True):
        model = sparse(bert(), "unstructured", device)
        set_sparsity_(model, 0.5)
        ids = BATCH["input_ids"].to(device)
        with torch.no_grad():
            alone = cast(Any, model).bert(input_ids=ids).pooler_output
            with materialized(model):
                made = cast(Any, model).bert(input_ids=ids).pooler_output
        assert all(attached.made is None for _, attached in masked_weights(model))
    torch.testing.assert_close(alone, made)


def test_scores_that_are_not_finite_keep_every_mask_and_name_their_weight(device: torch.device) -> None:
    from pst.errors import ModelError

    with kernels.forced(True):
        model = sparse(bert(), "unstructured", device)
        set_sparsity_(model, 0.5)
        before = [mask.clone() for mask in masks_of(model)]
        cast(Any, model).bert.encoder.layer[1].output.dense.parametrizations.weight[0].R.data[0] = float("nan")
        with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight hold NaN"):
            set_sparsity_(model, 0.6)
    assert all(torch.equal(one, other) for one, other in zip(before, masks_of(model), strict=True))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_who_does_not_wait_is_told_later_which_weight_was_not_finite(pattern: str, device: torch.device) -> None:
    """Also when the scores have become finite again, or others not, by then."""
    from pst.errors import ModelError

    with kernels.forced(True):
        model = sparse(bert(), pattern, device)
        weights = [part for part in model.modules() if isinstance(part, MaskedWeight)]
        fine = set_sparsity_(model, 0.25, wait=False)
        cast(Any, model).bert.encoder.layer[1].output.dense.parametrizations.weight[0].R.data[0] = float("nan")
        broken = set_sparsity_(model, 0.3, wait=False)
        for part in weights:
            part.get_parameter("R").data.zero_()
        cast(Any, model).bert.encoder.layer[0].output.dense.parametrizations.weight[0].C.data[0] = float("inf")
        fine.check()
        with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight hold NaN"):
            broken.check()
        cast(Any, model).bert.encoder.layer[0].output.dense.parametrizations.weight[0].C.data[0] = 0.0
        set_sparsity_(model, 0.25, wait=False).check()
        masks = [mask.clone() for mask in masks_of(model)]
        set_sparsity_(model, 0.25)
        assert all(torch.equal(one, other) for one, other in zip(masks, masks_of(model), strict=True))


def test_without_kernels_nothing_is_told_later(device: torch.device) -> None:
    from pst.errors import ModelError

    with kernels.forced(False):
        model = sparse(bert(), "unstructured", device)
        set_sparsity_(model, 0.5, wait=False).check()
        cast(Any, model).bert.encoder.layer[1].output.dense.parametrizations.weight[0].R.data[0] = float("nan")
        with pytest.raises(ModelError, match=r"layer\.1\.output\.dense\.weight hold NaN"):
            set_sparsity_(model, 0.6, wait=False)


def test_a_copy_and_a_moved_model_have_tables_of_their_own(device: torch.device) -> None:
    with kernels.forced(True):
        model = sparse(bert(), "unstructured", device)
        set_sparsity_(model, 0.5)
        first = model(**batch_on(device)).logits
        other = copy.deepcopy(model)
        with torch.no_grad():
            for part in other.modules():
                if isinstance(part, MaskedWeight):
                    part.mask.fill_(True)
        assert torch.equal(model(**batch_on(device)).logits, first)
        assert not torch.equal(other(**batch_on(device)).logits, first)
        model.double().float()  # new storage for every tensor
        torch.testing.assert_close(model(**batch_on(device)).logits, first)


def test_gradient_checkpointing_trains_alike(device: torch.device) -> None:
    base, batch, grads = bert(), batch_on(device), []
    with kernels.forced(True):
        for checkpointing in (False, True):
            model = sparse(base, "unstructured", device)
            if checkpointing:
                plain: Any = model  # the older name warns in newer versions of transformers
                enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
                enable()
            set_sparsity_(model, 0.5)
            model(**batch).loss.backward()
            grads.append([part.get_parameter("V").grad for part in model.modules() if isinstance(part, MaskedWeight)])
    assert len(grads[0]) == 12
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_is_held_after_merging(device: torch.device) -> None:
    with kernels.forced(True):
        model = sparse(bert(), "unstructured", device)
        model(**batch_on(device))
        assert groups_of(model)
        merge_(model)
        assert not list(masked_weights(model))
        assert model not in materialize._groups
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_model_that_was_called_without_the_kernels_uses_them_later(device: torch.device) -> None:
    """As one that is called on the processor, and then moved to a GPU."""
    with kernels.forced(False):
        model = sparse(bert(), "unstructured", device)
        model(**batch_on(device))
        assert groups_of(model) == []
    with kernels.forced(True):
        assert len(groups_of(model)) == 1


def test_matrices_beyond_32_bit_indices_are_left_to_torch(device: torch.device) -> None:
    from pst.importance import Scales
    from pst.kernels.matrices import serves
    from pst.masked_weight import MaskedLowRank

    weight = torch.zeros(4, 4, device=device)
    part = MaskedLowRank(weight, axis=1, r1=1, r2=1, scales=Scales(alpha1=1.0, alpha2=1.0, beta=1.0)).to(device)
    assert serves(part, weight)
    part.mask = torch.empty(2**16, 2**15, dtype=torch.bool, device="meta")
    assert not serves(part, weight)
