"""Each method with each pattern in each storage: exact counts on the way and at the end, and merging bit for bit."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from pst.masked_weight import MaskedWeight
from pst.methods import Method, names
from pst.methods.fixed_mask import FixedMask
from pst.methods.magnitude import Magnitude
from pst.methods.movement import Movement
from pst.methods.pst import PST
from pst.methods.soft_movement import SoftMovement
from pst.patterns import parse_pattern
from pst.schedule import CubicSchedule
from pst.sparsify import PrunableWeight, merge_, prunable_weights, set_sparsity_, sparsify_
from tests.pst.oracle import Net

RATES: dict[str, Any] = {"lr": 1e-2}
METHODS: dict[str, Callable[[], Method]] = {
    "pst": lambda: PST(r1=2, r2=3, lr_update=1e-2, lr_scores=3e-2, **RATES),
    "pst --faithful": lambda: PST(r1=2, r2=3, lr_update=1e-2, lr_scores=3e-2, alpha="one", faithful=True, **RATES),
    "magnitude": lambda: Magnitude(**RATES),
    "movement": lambda: Movement(lr_scores=3e-2, **RATES),
    "soft_movement": lambda: SoftMovement(lr_scores=3e-2, **RATES),
    "fixed_mask": lambda: FixedMask(r2=3, lr_update=1e-2, **RATES),
}
PATTERNS = {"unstructured": 0.8, "2:4": 0.5, "4:8": 0.5, "block:4x4": 0.7}
STEPS = 8


class Conv1DNet(nn.Module):
    """A GPT-2 block, whose c_attn holds three matrices, under a head."""

    base_model_prefix = "transformer"

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, attn_implementation="eager")
        self.config = config
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([GPT2Block(config, layer_idx=0)])})
        self.score = nn.Linear(16, 3)

    def forward(self, X: Tensor) -> Tensor:
        blocks: Any = self.transformer["h"]
        found = blocks[0](X)
        hidden: Tensor = found[0] if isinstance(found, tuple) else found
        logits: Tensor = self.score(hidden.mean(1))
        return logits


class LinearNet(Net):
    def __init__(self) -> None:
        super().__init__(lambda _, inputs, outputs: nn.Linear(inputs, outputs), width=8)

    def forward(self, X: Tensor) -> Tensor:
        return super().forward(X[:, 0, :8])


LAYERS: dict[str, Callable[[], nn.Module]] = {"linear": LinearNet, "conv1d fused": Conv1DNet}
SHAPE = (5, 6, 16)  # rows, tokens, width


def entries(weights: Sequence[PrunableWeight]) -> list[int]:
    return [matrix.numel() for item in weights for matrix in item.matrices()]


def zeros(masks: Sequence[MaskedWeight]) -> list[int]:
    return [int((~part.mask).sum()) for part in masks]


def expected_zeros(sizes: list[int], pattern: str, sparsity: float) -> list[int]:
    """By each pattern's own arithmetic: entries, tiles of 16, or groups of M that become N:M."""
    if pattern == "unstructured":
        return [int(size * sparsity) for size in sizes]
    if pattern == "block:4x4":
        return [16 * int(size // 16 * sparsity) for size in sizes]
    n, m = map(int, pattern.split(":"))
    return [(m - n) * int(size // m * (sparsity / (1 - n / m))) for size in sizes]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("pattern", "final"), PATTERNS.items())
@pytest.mark.parametrize("name", METHODS)
def test_exact_counts_and_an_exact_merge(name: str, pattern: str, final: float, layers: str) -> None:
    torch.manual_seed(0)
    model, method = LAYERS[layers]().eval(), METHODS[name]()
    if name == "fixed_mask":
        sparsify_(model, method=Magnitude(), pattern=pattern)
        set_sparsity_(model, final)
        merge_(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = sparsify_(model, method=method, pattern=pattern)
    sizes = entries(weights)
    assert len(sizes) == {"linear": 4, "conv1d fused": 6}[layers]
    masks = [part for part in model.modules() if isinstance(part, MaskedWeight)]
    optimizer = torch.optim.AdamW(method.param_groups(model))
    schedule = CubicSchedule(initial=0.0, final=final, steps=STEPS)
    generator = torch.Generator().manual_seed(1)

    def check(sparsity: float) -> None:
        wanted = expected_zeros(sizes, pattern, final if name == "fixed_mask" else sparsity)
        together = name == "soft_movement" and pattern not in ("2:4", "4:8")
        found = zeros(masks)
        assert (sum(found), len(found)) == (sum(wanted), len(wanted)) if together else found == wanted

    for step in range(STEPS):
        set_sparsity_(model, schedule(step))
        check(schedule(step))
        optimizer.zero_grad()
        labels = torch.randint(3, (5,), generator=generator)
        nn.functional.cross_entropy(model(torch.randn(SHAPE, generator=generator)), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    set_sparsity_(model, final)
    check(final)
    chosen = [part.mask.clone() for part in masks]
    for part in masks:
        assert parse_pattern(pattern).holds(part.mask.numpy(), axis=1)

    X = torch.randn(SHAPE, generator=generator)
    with torch.no_grad():
        masked = {item.name: item.weight.clone() for item in weights}
        logits = model(X)
        merge_(model)
        assert torch.equal(model(X), logits)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    state = model.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    matrices = [
        (matrix if item.axis == 1 else matrix.T) for item in prunable_weights(model) for matrix in item.matrices()
    ]
    for matrix, mask in zip(matrices, chosen, strict=True):
        assert not matrix[~mask].any()
        assert not torch.signbit(matrix[~mask]).any()
        assert bool((matrix[mask] != 0).all())
    for key, value in masked.items():
        assert torch.equal(state[key], value)
        assert state[key].is_contiguous()
        assert not torch.equal(value, before[key])
    if name == "fixed_mask":
        assert all(torch.equal(state[key] == 0, before[key] == 0) for key in masked)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", METHODS)
def test_under_autocast_the_weight_is_made_in_full_and_merging_is_as_exact(name: str, layers: str) -> None:
    torch.manual_seed(0)
    model, method = LAYERS[layers]().eval(), METHODS[name]()
    if name == "fixed_mask":
        sparsify_(model, method=Magnitude())
        set_sparsity_(model, 0.5)
        merge_(model)
    weights = sparsify_(model, method=method)
    optimizer = torch.optim.AdamW(method.param_groups(model))
    generator = torch.Generator().manual_seed(1)
    for inside in (False, True):  # backward() belongs outside of autocast, but some call it inside
        with torch.autocast("cpu", torch.bfloat16):
            set_sparsity_(model, 0.5)
            labels = torch.randint(3, (5,), generator=generator)
            loss = nn.functional.cross_entropy(model(torch.randn(SHAPE, generator=generator)), labels)
            if inside:
                loss.backward()  # type: ignore[no-untyped-call]
        if not inside:
            loss.backward()  # type: ignore[no-untyped-call]
        assert {each.grad.dtype for each in model.parameters() if each.grad is not None} == {torch.float32}
        optimizer.step()
    X = torch.randn(SHAPE, generator=generator)
    set_sparsity_(model, 0.5)
    masks = [part.mask.clone() for part in model.modules() if isinstance(part, MaskedWeight)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(item.weight.dtype == torch.float32 for item in weights)
        set_sparsity_(model, 0.5)
        parts = [part for part in model.modules() if isinstance(part, MaskedWeight)]
        assert all(torch.equal(part.mask, mask) for part, mask in zip(parts, masks, strict=True))
        logits = model(X)
    with torch.no_grad():
        outside = [item.weight.clone() for item in weights]
        merge_(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(X), logits)
    assert all(torch.equal(item.weight, weight) for item, weight in zip(prunable_weights(model), outside, strict=True))


def test_no_method_is_left_out() -> None:
    assert {name.split()[0] for name in METHODS} | {"dense"} == set(names())
