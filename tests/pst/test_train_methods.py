"""Every method through a whole run: what the saved model holds, and what its report says of it."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pst.train
from pst.batches import training_rows
from pst.errors import ConfigError, ModelError, PatternError
from pst.models import architecture
from pst.patterns import parse_pattern
from pst.train import InterruptedRun, train
from tests.pst.training import log_lines, options, report, tensors, weights


def matrices(output: Path, base: str) -> dict[str, torch.Tensor]:
    """The prunable matrices of a finished run, outputs x inputs, those of a fused weight by themselves."""
    rules = architecture(base)
    found: dict[str, torch.Tensor] = {}
    for name, weight in tensors(output / "model").items():
        if name.endswith(".weight") and rules.prunable.search(name.removesuffix(".weight")):
            by_row = weight if rules.axis == 1 else weight.T
            parts = rules.parts(name.removesuffix(".weight"))
            found |= {f"{name}[{i}]": part for i, part in enumerate(by_row.chunk(parts, 0))}
    return found


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("method", ["movement", "soft_movement", "pst", "magnitude"])
@pytest.mark.parametrize("base", ["bert", "gpt2"])
def test_counts_are_exact(
    base: str, method: str, pattern: str, request: pytest.FixtureRequest, reviews_file: Path, tmp_path: Path
) -> None:
    model = request.getfixturevalue(f"tiny_{base}")
    train(options(model, reviews_file, method=method, pattern=pattern, sparsity=0.5), tmp_path / "out")
    found = matrices(tmp_path / "out", base)
    assert len(found) == 12  # six a layer, also where three are fused
    assert sum(map(zeros, found.values())) == sum(weight.numel() for weight in found.values()) // 2
    assert all(parse_pattern(pattern).holds(weight.numpy(), axis=1) for weight in found.values())
    if method != "soft_movement":
        assert all(zeros(weight) == weight.numel() // 2 for weight in found.values())
    assert report(tmp_path / "out")["sparsity"] == {"requested": 0.5, "measured": 0.5}


def test_a_global_budget(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    train(options(tiny_bert, reviews_file, sparsity=0.8, budget="global"), tmp_path / "out")
    found = matrices(tmp_path / "out", "bert")
    shares = {name: zeros(weight) / weight.numel() for name, weight in found.items()}
    assert sum(map(zeros, found.values())) == sum(int(weight.numel() * 0.8) for weight in found.values())
    assert max(shares.values()) - min(shares.values()) > 0.01
    with pytest.raises(PatternError, match=r"2:4 fixes the ratio .* budget=local"):
        train(options(tiny_bert, reviews_file, pattern="2:4", budget="global"), tmp_path / "other")


@pytest.fixture
def sparse(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> Path:
    """A 2:4 model."""
    return train(options(tiny_bert, reviews_file, pattern="2:4", steps=4), tmp_path / "sparse").model


def test_another_task_keeps_every_zero(sparse: Path, reviews_file: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scores.jsonl"
    lines = [json.loads(line) for line in reviews_file.read_text().splitlines()]
    rows = [{"sentence": row["sentence"], "label": row["label"] + 0.5 * len(row["sentence"])} for row in lines]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    headless = tmp_path / "headless"
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(sparse).save_pretrained(headless)
    AutoTokenizer.from_pretrained(sparse).save_pretrained(headless)
    config = options(headless, scored, method="fixed_mask", sparsity=None, lr_update=1e-2)
    train(config, tmp_path / "out")
    said = report(tmp_path / "out")
    assert (said["task"], said["pattern"], said["sparsity"]["measured"]) == ("regression", "2:4", 0.5)
    before, after = matrices(tmp_path / "sparse", "bert"), matrices(tmp_path / "out", "bert")
    for name, weight in before.items():
        assert torch.equal(weight == 0, after[name] == 0)
        assert not torch.equal(weight, after[name])
    assert {line["sparsity"] for line in log_lines(tmp_path / "out") if "sparsity" in line} == {0.5}


def test_its_run_resumes(sparse: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(sparse, reviews_file, method="fixed_mask", sparsity=None)
    train(config, tmp_path / "whole")

    def signalled(*args: Any, **named: Any) -> Iterator[list[int]]:
        for step, rows in enumerate(training_rows(*args, **named)):
            if step == 4:
                signal.raise_signal(signal.SIGINT)
            yield rows

    with monkeypatch.context() as patch:
        patch.setattr(pst.train, "training_rows", signalled)
        with pytest.raises(InterruptedRun):
            train(config, tmp_path / "out")
    train(config, tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert train(config, tmp_path / "out", resume=True).steps == 12  # finished, and known as the same run


def test_what_has_no_zeros_to_keep(tiny_bert: Path, sparse: Path, reviews_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no zeros .* nothing to keep"):
        train(options(tiny_bert, reviews_file, method="fixed_mask", sparsity=None), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"fixed_mask keeps the zeros .* leave --sparsity out"):
        train(options(sparse, reviews_file, method="fixed_mask", sparsity=0.5), tmp_path / "out")
    with pytest.raises(PatternError, match=r"do not follow pattern 1:4"):
        train(options(sparse, reviews_file, method="fixed_mask", pattern="1:4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bfloat16_arithmetic(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    train(options(tiny_bert, reviews_file, precision="bf16", pattern="2:4"), tmp_path / "low")
    train(options(tiny_bert, reviews_file, pattern="2:4"), tmp_path / "full")
    found = matrices(tmp_path / "low", "bert")
    assert all(weight.dtype == torch.float32 and zeros(weight) == weight.numel() // 2 for weight in found.values())
    losses = [[line["loss"] for line in log_lines(tmp_path / name)[:-1]] for name in ("low", "full")]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
