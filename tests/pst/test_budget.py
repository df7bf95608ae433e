"""The global budget: the same total as the local one, shares by a sort of everything, floors, ties, refusals."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification

from pst.budget import FLOOR, _kth_by_bisection, _kth_by_partition, allocate
from pst.errors import ModelError, PatternError
from pst.masked_weight import MaskedWeight
from pst.materialize import masked_weights
from pst.methods import Method
from pst.methods.magnitude import Magnitude
from pst.methods.movement import Movement
from pst.methods.pst import PST
from pst.patterns import parse_pattern, sharing
from pst.sparsify import merge_, prunable_weights, set_sparsity_, sparsify_
from tests.pst.oracle import keep_in_all

Load = Callable[[str], nn.Module]
SPARSITIES = [0.0, 1e-9, 0.013, 0.3, 0.5, 0.9, 0.97, 0.999, 1 - 2**-53]


@pytest.fixture
def load(tiny_bert: Path, tiny_gpt2: Path) -> Load:
    def load(name: str) -> nn.Module:
        model: nn.Module
        if name == "bert":
            model = BertForSequenceClassification.from_pretrained(tiny_bert).eval()
        else:
            model = GPT2ForSequenceClassification.from_pretrained(tiny_gpt2).eval()
        return model

    return load


def scores(kind: str, sizes: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "quantised":
        return [torch.randint(-3, 4, (size,), generator=generator).float() for size in sizes]
    if kind == "equal":
        return [torch.zeros(size) for size in sizes]
    spread = 10.0 if kind == "unlike" else 1.0  # one matrix far below the others: floors bind
    return [torch.randn(size, generator=generator) + spread * at for at, size in enumerate(sizes)]


# -- shares --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["like", "unlike", "quantised", "equal"])
@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [40, 7, 100], [64, 64, 64, 64], [1, 300, 2]])
def test_shares_are_those_of_a_sort_of_everything(kind: str, sizes: list[int]) -> None:
    for seed, sparsity in enumerate(SPARSITIES):
        units = scores(kind, sizes, seed)
        counts = allocate(units, sparsity)
        assert sum(counts) == sum(int(size * sparsity) for size in sizes)
        for size, count in zip(sizes, counts, strict=True):
            assert size - count >= max(1, math.ceil(FLOOR * (size - int(size * sparsity))))
        if kind in ("like", "unlike"):
            expected = [int((mask == 0).sum()) for mask in keep_in_all(units, sparsity, floor=FLOOR)]
            assert counts == expected, (sizes, sparsity)


def test_of_equal_scores_the_later_matrix_loses_its_own_first() -> None:
    assert allocate([torch.zeros(10), torch.zeros(10), torch.zeros(10)], 0.3) == [0, 0, 9]
    assert allocate([torch.tensor([-1.0, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1])], 0.5) == [2, 2]
    assert allocate([torch.zeros(10), -torch.zeros(10)], 0.4) == [0, 8]  # -0.0 is 0.0


def test_a_matrix_keeps_a_tenth_of_its_own_share() -> None:
    units = [torch.arange(100.0), torch.arange(100.0) + 1000, torch.arange(100.0) + 1000.5]
    assert allocate(units, 0.5) == [95, 28, 27]  # not [100, 25, 25]
    assert allocate(units, 0.99) == [99, 99, 99]
    assert allocate([torch.arange(100.0), torch.arange(100.0) + 1000], 0.1) == [20, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["like", "quantised", "equal"])
def test_both_thresholds_agree(kind: str, dtype: torch.dtype) -> None:
    for seed in range(12):
        size = 1 + 37 * seed
        flat = scores(kind, [size], seed)[0].to(dtype) * 10.0 ** (seed * 3 - 20)
        for count in {1, size, 1 + size // 2, 1 + size // 7}:
            expected = float(flat.sort().values[count - 1])
            scratch = flat.clone()
            assert _kth_by_partition(flat, count) == _kth_by_bisection(scratch, count) == expected
            assert torch.equal(scratch, flat)  # given back as it was
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38], dtype=torch.float32)
    for count in range(1, 7):
        assert _kth_by_bisection(edges.clone(), count) == float(edges.sort().values[count - 1])


def test_half_precision_scores_are_shared_as_well() -> None:
    units = scores("quantised", [64, 32], 3)
    assert allocate([each.to(torch.bfloat16) for each in units], 0.5) == allocate(units, 0.5)


# -- on models -----------------------------------------------------------------------------------------------------


def parts_of(model: nn.Module) -> list[tuple[MaskedWeight, Tensor]]:
    found = []
    for module, attached in masked_weights(model):
        found += attached.matrices(module.get_parameter("parametrizations.weight.original").detach())
    return found


@torch.no_grad()
def move_(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("method", [PST(), Magnitude(), Movement()], ids=["pst", "magnitude", "movement"])
def test_masks_are_the_highest_scores_of_the_whole_model(load: Load, name: str, method: Method) -> None:
    model = load(name)
    sparsify_(model, method=method)
    move_(model)
    for sparsity in (0.5, 0.9):
        set_sparsity_(model, sparsity, budget="global")
        found = parts_of(model)
        assert len(found) == 12  # GPT-2's q, k and v compete one by one
        with torch.no_grad():
            scale = [1.0 if isinstance(method, Movement) else float(piece.abs().mean()) for _, piece in found]
            every = [part.scores(piece) / each for (part, piece), each in zip(found, scale, strict=True)]
        for (part, _), mask in zip(found, keep_in_all(every, sparsity, floor=FLOOR), strict=True):
            assert torch.equal(part.mask, mask.bool())
            assert float(part.sparsity) == int((mask == 0).sum()) / mask.numel()
        assert sum(int((~part.mask).sum()) for part, _ in found) == sum(int(each.numel() * sparsity) for each in every)
        assert len({int((~part.mask).sum()) for part, _ in found}) > 1


@pytest.mark.parametrize("size", [7, 49, 98, 103, 107])
def test_counts_survive_the_way_through_a_fraction(size: int) -> None:
    """int(49 * (1 / 49)) is 0: a share that is handed on as a fraction has to come back as the same count."""
    layers = [nn.Linear(size, 1), nn.Linear(1, size)]
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"a": layers[0], "b": layers[1]})])})
    sparsify_(model, method=Magnitude())
    for zeros in range(1, size):
        set_sparsity_(model, (zeros + 0.5) / size, budget="global")
        found = [int((~part.mask).sum()) for part, _ in parts_of(model)]
        assert sum(found) == 2 * zeros
        assert found == [round(float(part.sparsity) * size) for part, _ in parts_of(model)]


def test_blocks_share_a_budget_and_stay_whole(load: Load) -> None:
    model = load("gpt2")
    sparsify_(model, method=Magnitude(), pattern="block:4x4")
    move_(model)
    set_sparsity_(model, 0.7, budget="global")
    found = parts_of(model)
    tiles = [part.mask.numel() // 16 for part, _ in found]
    assert sum(int((~part.mask).sum()) for part, _ in found) == 16 * sum(int(count * 0.7) for count in tiles)
    assert all(parse_pattern("block:4x4").holds(part.mask.numpy(), axis=1) for part, _ in found)
    pooled = [sharing(parse_pattern("block:4x4")).units(part.common_scores(piece), axis=1) for part, piece in found]
    for (part, _), keep in zip(found, keep_in_all(pooled, 0.7, floor=FLOOR), strict=True):
        assert torch.equal(part.mask[::4, ::4], keep.bool())


def test_a_weight_of_another_scale_loses_no_more_than_its_share(load: Load) -> None:
    """Scores are in units of each weight's mean: shrinking one changes nothing but its values."""
    shares = []
    for factor in (1.0, 1 / 1024):
        model = load("bert")
        with torch.no_grad():
            prunable_weights(model)[3].weight.mul_(factor)
        sparsify_(model, method=Magnitude())
        set_sparsity_(model, 0.8, budget="global")
        shares.append([int((~part.mask).sum()) for part, _ in parts_of(model)])
    assert shares[0] == shares[1]


def test_without_sparsity_every_mask_is_full_and_local_comes_back(load: Load) -> None:
    model = load("bert")
    sparsify_(model, method=Magnitude())
    set_sparsity_(model, 0.9, budget="global")
    set_sparsity_(model, 0.0, budget="global")
    assert all(part.mask.all() for part, _ in parts_of(model))
    for budget in (None, "local"):
        set_sparsity_(model, 0.9, budget="global")
        set_sparsity_(model, 0.5, budget=budget)
        assert all(int(part.mask.sum()) * 2 == part.mask.numel() for part, _ in parts_of(model))
    set_sparsity_(model, 0.9, budget="global")
    masks = [part.mask.clone() for part, _ in parts_of(model)]
    merge_(model)
    again = load("bert")
    sparsify_(again, method=Magnitude())
    set_sparsity_(again, 0.9, budget="global")  # the same model, the same masks
    assert all(torch.equal(part.mask, mask) for (part, _), mask in zip(parts_of(again), masks, strict=True))


@pytest.mark.parametrize("spec", ["2:4", "1:8"])
def test_n_of_m_has_nothing_to_share(load: Load, spec: str) -> None:
    model = load("bert")
    sparsify_(model, pattern=spec)
    with pytest.raises(PatternError, match=rf"Pattern {spec} fixes the ratio.*--set budget=local, or --pattern unstr"):
        set_sparsity_(model, 0.5, budget="global")
    assert all(part.mask.all() for part, _ in parts_of(model))
    assert sharing(parse_pattern("block:1x4")).spec == "block:1x4"


def test_scores_that_are_no_numbers_name_their_weight_before_any_mask_changes(load: Load) -> None:
    model = load("gpt2")
    sparsify_(model)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.parametrizations.weight.0.R")[0] = float("inf")
    with pytest.raises(ModelError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight hold NaN or infinity"):
        set_sparsity_(model, 0.5, budget="global")
    assert all(part.mask.all() for part, _ in parts_of(model))
