"""Exact counts, costs against a counter of torch's, and scores that are pooled and learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pst.errors import ModelError
from pst.methods.magnitude import Magnitude
from pst.methods.pst import PST
from pst.patterns.structured import Structured
from pst.sparsify import merge_, set_sparsity_, sparsify_
from pst.structured.choose import keep_units, kept_units
from pst.structured.storage import from_pretrained
from pst.structured.units import LENGTH, Units, find_units, weight_of
from tests.pst.structured.models import ARCHITECTURES, make, matrix, move_

CLASSIFIER = "AutoModelForSequenceClassification"


@pytest.fixture
def bert(tmp_path: Path) -> Any:
    return from_pretrained(CLASSIFIER, make(tmp_path, "bert")).eval()


def choice(model: nn.Module, sparsity: float, *, budget: Any = "global", **options: Any) -> tuple[list[Units], Any]:
    """The units of *model*, and which of them random scores keep."""
    units, generator = find_units(model), torch.Generator().manual_seed(1)
    scores = [torch.rand(one.count, generator=generator, dtype=torch.float64) for one in units]
    return units, (scores, keep_units(units, scores, sparsity, Structured(**options), budget=budget))


def share(units: list[Units], kept: list[Tensor], target: str) -> float:
    whole = sum(one.count * one.cost(target) for one in units)
    return 1 - sum(int(keep.sum()) * one.cost(target) for one, keep in zip(units, kept, strict=True)) / whole


# -- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7])
@pytest.mark.parametrize("target", ["macs", "parameters"])
@pytest.mark.parametrize("budget", ["local", "global"])
def test_the_least_that_reaches_the_sparsity_goes(bert: Any, budget: str, target: Any, sparsity: float) -> None:
    units, (_, kept) = choice(bert, sparsity, budget=budget, target=target)
    gone = share(units, kept, target)
    layers = 2 if budget == "local" else 1
    whole = sum(one.count * one.cost(target) for one in units)
    largest = layers * max(one.cost(target) * (1 if one.kind == "heads" else 8) for one in units) / whole
    assert sparsity <= gone < sparsity + largest
    for one, keep in zip(units, kept, strict=True):
        assert keep.any()
        assert one.kind == "heads" or int(keep.sum()) % 8 == 0
    if budget == "local":
        assert [int(keep.sum()) for keep in kept[:2]] == [int(keep.sum()) for keep in kept[2:]]


def test_the_lowest_scores_go(bert: Any) -> None:
    units, (scores, kept) = choice(bert, 0.4, multiple=1)
    gone = torch.cat([found[~keep] for found, keep in zip(scores, kept, strict=True)])
    left = torch.cat([found[keep] for found, keep in zip(scores, kept, strict=True)])
    assert gone.max() < left.min()
    assert 0 < len(gone) < sum(one.count for one in units)


def test_neurons_that_are_no_multiple_lose_the_rest_first(bert: Any) -> None:
    units, (_, kept) = choice(bert, 0.01, multiple=24, kinds="neurons")
    assert sorted(int(keep.sum()) for one, keep in zip(units, kept, strict=True) if one.kind == "neurons") == [48, 64]


def test_one_kind_alone(bert: Any) -> None:
    units, (_, kept) = choice(bert, 0.3, kinds="heads")
    assert all(bool(keep.all()) for one, keep in zip(units, kept, strict=True) if one.kind == "neurons")
    with pytest.raises(ModelError, match=r"Sparsity 0.9 cannot be reached by removing neurons: at most 0\.\d+ can go"):
        choice(bert, 0.9, kinds="neurons")


def test_of_equal_scores_the_later_goes_first(bert: Any) -> None:
    units = find_units(bert)
    scores = [torch.ones(one.count) for one in units]
    kept = keep_units(units, scores, 0.05, Structured(multiple=1), budget="global")
    assert kept[3].tolist() == sorted(kept[3].tolist(), reverse=True)
    assert all(bool(keep.all()) for keep in kept[:3])
    assert not kept[3].all()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_multiply_adds_are_those_that_torch_counts(tmp_path: Path, model_type: str) -> None:
    """Of a whole forward pass, before and after; what is outside of the blocks is the same and falls out."""
    model = from_pretrained(CLASSIFIER, make(tmp_path, model_type, max_position_embeddings=256), dtype="float32")
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 30, (1, LENGTH))

    def counted() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
        return int(counter.get_total_flops())

    before = counted()
    sparsify_(model, pattern=Structured(multiple=1))
    set_sparsity_(model, 0.4)
    merge_(model)
    report = model.config.structured["macs"]
    assert before - counted() == 2 * LENGTH * (report["dense"] - report["kept"])
    assert report["dense"] * 2 * LENGTH < before < 1.4 * report["dense"] * 2 * LENGTH


# -- scores --------------------------------------------------------------------------------------------------------


def test_scores_are_pooled_over_every_entry_of_a_unit(bert: Any) -> None:
    """By hand, for magnitudes: the mean score of a unit's rows and columns, each weight in units of its mean."""
    units = find_units(bert)
    expected = []
    for one in units:
        total = torch.zeros(one.count, dtype=torch.float64)
        for member in (*one.producers, one.consumer):
            W = weight_of(member.module).detach().abs().double()
            W = (W.T if member is one.consumer else W) / W.mean()
            total += torch.stack([unit.sum() for unit in torch.split(W, member.width)])
        expected.append(total / one.macs)
    sparsify_(bert, method=Magnitude(), pattern=Structured(multiple=1))
    set_sparsity_(bert, 0.35, budget="global")
    kept = kept_units(find_units(bert))
    for one, keep, wanted in zip(
        units, kept, keep_units(units, expected, 0.35, Structured(multiple=1), budget="global"), strict=True
    ):
        assert torch.equal(keep, wanted), one.name


@pytest.mark.parametrize("at", [0, 1], ids=["heads", "neurons"])
def test_rows_and_columns_decide_which_unit_stays(bert: Any, at: int) -> None:
    """R of a producer or C of the consumer, raised for the unit that went first, brings it back."""
    sparsify_(bert, pattern=Structured(multiple=1, kinds=("heads", "neurons")[at]))
    for name in ("R", "C"):
        set_sparsity_(bert, 0.1)
        one = find_units(bert)[at]
        lowest = int((~kept_units([one])[0]).nonzero()[0])
        member = one.producers[0] if name == "R" else one.consumer
        part, _ = matrix(member)
        with torch.no_grad():
            getattr(part, name)[lowest * member.width : (lowest + 1) * member.width] += 50
        set_sparsity_(bert, 0.1)
        assert bool(kept_units([one])[0][lowest])
        with torch.no_grad():
            getattr(part, name).zero_()


def test_gradients_of_rows_and_columns_are_those_of_a_gate(bert: Any) -> None:
    """dL/dC summed over a unit's columns is alpha2 dL/dm at the unit's gate m, which stands before the consumer.

    Of units that are out (m = 0) as well: what they would add is seen. Of producers, R of a kept neuron's row gets what
    a factor on that row would.
    """
    bert.double()
    sparsify_(bert, method=PST(r2=2), pattern=Structured(multiple=1))
    move_(bert)
    set_sparsity_(bert, 0.5, budget="local")
    units, kept = find_units(bert), kept_units(find_units(bert))
    assert all(not bool(keep.all()) for keep in kept)
    ids = torch.randint(5, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    answer = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2])}
    bert(**answer).loss.backward()
    found = [matrix(one.consumer)[0] for one in units]
    columns = [
        part.C.grad.view(one.count, -1).sum(1) / part.scales.alpha2 for one, part in zip(units, found, strict=True)
    ]
    producer = matrix(units[1].producers[0])[0]
    rows = producer.R.grad / producer.scales.alpha2

    gates = [keep.double().requires_grad_() for keep in kept]
    factor = torch.ones(units[1].count, dtype=torch.float64, requires_grad=True)
    hooks = []
    for one, part, gate in zip(units, found, gates, strict=True):
        part.mask.fill_(True)
        wide = gate.repeat_interleave(one.consumer.width)
        hooks.append(one.consumer.module.register_forward_pre_hook(lambda _, args, wide=wide: (args[0] * wide,)))
    linear = units[1].producers[0].module
    hooks.append(linear.register_forward_hook(lambda _, args, out: (out - linear.bias) * factor + linear.bias))
    expected = torch.autograd.grad(bert(**answer).loss, [*gates, factor])
    for mine, wanted in zip([*columns, rows], expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-12)
    assert all(bool((wanted[~keep].abs() > 0).all()) for wanted, keep in zip(expected, kept, strict=False))


def test_units_without_weights_go_first_and_scores_must_be_finite(bert: Any) -> None:
    sparsify_(bert, pattern=Structured(multiple=1))
    neurons = find_units(bert)[3]
    part, original = matrix(neurons.consumer)
    with torch.no_grad():
        original[:, 5] = 0
        part.C[5] = 1000
        set_sparsity_(bert, 1e-6)
        assert (~kept_units([neurons])[0]).nonzero().flatten().tolist() == [5]
        part.C[6] = float("nan")
    with pytest.raises(ModelError, match="The scores of the neurons of layer 1 hold NaN"):
        set_sparsity_(bert, 0.5)
