"""Stages of a real run: when they begin, what they see, and that a resumed run repeats them."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import pst.train
from pst.batches import training_rows
from pst.calibration import Calibration, input_moments
from pst.compensation import compensate, input_scale, refine
from pst.distributed import Processes
from pst.errors import ConfigError
from pst.importance import updated_weight
from pst.materialize import masked_weights
from pst.methods import Method
from pst.methods.magnitude import Magnitude
from pst.methods.pst import PST
from pst.patterns import parse_pattern
from pst.sparsify import prunable_weights, set_sparsity_, sparsify_
from pst.tasks import prepare
from pst.train import InterruptedRun, train
from tests.pst.training import options, weights

CPU = torch.device("cpu")


def original(module: Any) -> torch.Tensor:
    """The weight under the masks, as stored."""
    weight: torch.Tensor = module.parametrizations.weight.original
    return weight


def stages(**changes: Any) -> Calibration:
    settings: dict[str, Any] = {"rows": None, "count": 8, "batch_size": 4, "seed": 0, "budget": None, "final": 0.9}
    return Calibration(**settings | changes)


def test_when_a_stage_begins() -> None:
    one = stages()
    begun = []
    for sparsity in [0.0, 0.01, 0.19, 0.2, 0.3, 0.36, 0.5, 0.8, 0.83, 0.85, 0.9, 0.9]:
        if one.due(sparsity):
            begun.append(sparsity)
            one.level = sparsity
    assert begun == [0.0, 0.2, 0.36, 0.5, 0.8, 0.85, 0.9]
    at_once = stages(final=0.5)
    assert at_once.due(0.5)
    at_once.level = 0.5
    assert not at_once.due(0.5)


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_moments_are_those_of_the_real_tokens(base: str, request: pytest.FixtureRequest, reviews_file: Path) -> None:
    """Against the inputs of each layer, one unpadded row at a time."""
    prepared = prepare(options(request.getfixturevalue(base), reviews_file).filled())
    model, rows = prepared.model, prepared.train
    sparsify_(model)
    set_sparsity_(model, 0.3)
    seen: dict[Any, Any] = {module: 0 for module, _ in masked_weights(model)}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, x: seen.__setitem__(module, seen[module] + x[0][0].double().T @ x[0][0].double())
        )
        for module in seen
    ]
    with torch.no_grad():
        model.eval()
        for row in range(12):
            model(**{name: value for name, value in rows.batch([row]).items() if name != "labels"})
    for hook in hooks:
        hook.remove()
    model.train()
    batches = [rows.batch(list(range(start, start + 4))) for start in (0, 4, 8)]
    moments = input_moments(model, batches, device=CPU, group=Processes())
    assert model.training
    assert moments.keys() == seen.keys()
    for module, H in moments.items():
        torch.testing.assert_close(H, seen[module].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("base", "pattern"), [("tiny_bert", "unstructured"), ("tiny_gpt2", "2:4")])
@pytest.mark.parametrize("method", [PST(), Magnitude()])
def test_a_stage(method: Method, base: str, pattern: str, request: pytest.FixtureRequest, reviews_file: Path) -> None:
    """Fold what there is to fold, scale, choose, refine, compensate: against the five written out."""
    prepared = prepare(options(request.getfixturevalue(base), reviews_file).filled())
    model, rows = prepared.model, prepared.train
    sparsify_(model, method=method, pattern=pattern)
    generator = torch.Generator().manual_seed(0)
    before = {}
    for module, attached in masked_weights(model):
        for part, piece in attached.matrices(original(module)):
            low: Any = part
            W = part.by_row(piece.detach())
            if isinstance(method, PST):
                low.V.data = 0.05 * torch.randn(low.V.shape, generator=generator)
                W = updated_weight(W, low.U, low.V, 1.0)
            before[part] = W.clone(), module
    everything = [rows.batch(list(range(start, min(start + 16, len(rows))))) for start in range(0, len(rows), 16)]
    expected = input_moments(model, everything, device=CPU, group=Processes())
    calibration = stages(rows=rows, count=1000, batch_size=16, final=0.5)
    calibration(model, 0.5, step=0, device=CPU, group=Processes())
    shape, refined = parse_pattern(pattern), 0
    for module, attached in masked_weights(model):
        for part, piece in attached.matrices(original(module)):
            W, H = before[part][0], expected[before[part][1]]
            begun = shape.mask(W.abs() * input_scale(H), 0.5, axis=1)
            mask = refine(W, H, begun, lambda S: shape.mask(S, 0.5, axis=1))
            refined += int((begun != mask).sum())
            assert (part.mask != mask).float().mean() < 0.01  # H was summed in another order of rows
            expected_weight = compensate(W, H, part.mask)
            assert (part.by_row(piece) - expected_weight).norm() < 1e-2 * expected_weight.norm()
            if isinstance(method, PST):
                assert int(torch.count_nonzero(part.V)) == 0  # type: ignore[arg-type]
            assert torch.equal(part.by_row(piece) != 0, part.mask)
    assert refined > 100


def test_methods_that_cannot_are_told(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calibration is for the methods pst and magnitude"):
        train(options(tiny_bert, reviews_file, method="movement", sparsity=0.7, calibration=8), tmp_path / "out")


def test_the_output_keeps_nearer(tiny_bert: Path, reviews_file: Path) -> None:
    """The purpose: half of the weights gone, and logits nearer to the dense ones than without."""
    distance = []
    for count in (0, 64):
        prepared = prepare(options(tiny_bert, reviews_file).filled())
        model, rows = prepared.model.eval(), prepared.train
        batch = {name: value for name, value in rows.batch(list(range(len(rows)))).items() if name != "labels"}
        with torch.no_grad():
            dense = model(**batch).logits
            sparsify_(model)
            if not count:
                set_sparsity_(model, 0.5)
            else:
                stages(rows=rows, count=count, final=0.5)(model, 0.5, step=0, device=CPU, group=Processes())
            distance.append(float((model(**batch).logits - dense).norm()))
    assert distance[1] < 0.9 * distance[0]


def test_what_a_mask_hides_is_forgotten(tiny_bert: Path, reviews_file: Path) -> None:
    """A second stage fits to what the model computes, of which U V under the mask never was a part."""
    prepared = prepare(options(tiny_bert, reviews_file).filled())
    model, rows = prepared.model, prepared.train
    sparsify_(model)
    calibration = stages(rows=rows, count=64, final=0.75)
    calibration(model, 0.5, step=0, device=CPU, group=Processes())
    generator = torch.Generator().manual_seed(0)
    for _, attached in masked_weights(model):
        low: Any = attached
        low.V.data = 0.02 * torch.randn(low.V.shape, generator=generator)
    set_sparsity_(model, 0.5)
    batch = {name: value for name, value in rows.batch(list(range(len(rows)))).items() if name != "labels"}
    with torch.no_grad():
        before = model.eval()(**batch).logits
        calibration(model, 0.5, step=1, device=CPU, group=Processes())
        after = model.eval()(**batch).logits
    assert all(int(torch.count_nonzero(cast(Any, attached).V)) == 0 for _, attached in masked_weights(model))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("changes", [{"sparsity": 0.7}, {"pattern": "2:4"}, {"sparsity": 0.6, "budget": "global"}])
def test_a_resumed_run_ends_the_same(
    changes: dict[str, Any], tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(tiny_bert, reviews_file, calibration=16, sparsity_warmup=0.0, sparsity_cooldown=0.2, **changes)
    train(config, tmp_path / "whole")
    train(options(tiny_bert, reviews_file, **changes, calibration=0), tmp_path / "without")
    assert weights(tmp_path / "whole") != weights(tmp_path / "without")
    for at in (3, 7, 11):

        def signalled(*args: Any, at: int = at, **named: Any) -> Iterator[list[int]]:
            for step, rows in enumerate(training_rows(*args, **named)):
                if step == at:
                    signal.raise_signal(signal.SIGINT)
                yield rows

        with monkeypatch.context() as patch:
            patch.setattr(pst.train, "training_rows", signalled)
            with pytest.raises(InterruptedRun):
                train(config, tmp_path / f"{at}")
        train(config, tmp_path / f"{at}", resume=True)
        assert weights(tmp_path / f"{at}") == weights(tmp_path / "whole")


def test_counts_stay_exact(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    train(options(tiny_bert, reviews_file, sparsity=0.7, calibration=16), tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    for item in prunable_weights(model):
        assert int((item.weight == 0).sum()) == int(item.weight.numel() * 0.7)
