"""The benchmark of a training step on a tiny BERT: its literal PST against the oracle, what it prints and writes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import train_step
from benchmarks.literal_pst import LiteralLinear, replace_linears_
from benchmarks.step_rows import KINDS, random_batches, random_bert, row_specs, start
from benchmarks.step_timing import distribution, require_finite
from pst.errors import PatternError
from pst.sparsify import prunable_weights
from tests.pst.oracle import NAMES, OracleLinear, keep_highest, keep_n_of_m

SMALL = ["--model-shape", "tiny", "--batch", "2", "--length", "8", "--rounds", "2", "--steps", "3", "--warmup", "1"]
SMALL += ["--device", "cpu"]
LITERAL = {"unstructured": partial(keep_highest, sparsity=0.7), "2:4": partial(keep_n_of_m, n=2, m=4)}


@pytest.mark.parametrize("pattern", LITERAL)
def test_literal_pst_has_the_outputs_and_gradients_of_the_oracle(pattern: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 7).double()
    literal = LiteralLinear(linear, rank=3, pattern=pattern, sparsity=0.7)
    tensors = {name: getattr(literal, name) for name in NAMES}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor += 0.1 * torch.randn_like(tensor)
    oracle = OracleLinear(
        linear.weight, linear.bias, tensors, keep=LITERAL[pattern], alpha1=1.0, alpha2=1.0, beta=1.0,
        magnitude_gradient=True,
    )  # fmt: skip
    X, T = torch.randn(5, 12, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    Y, expected = literal(X), oracle(X)
    torch.testing.assert_close(Y, expected)
    ((Y - T) ** 2).sum().backward()
    ((expected - T) ** 2).sum().backward()
    for name in NAMES:
        torch.testing.assert_close(getattr(literal, name).grad, getattr(oracle, name).grad)
    assert literal.W0.grad is None
    assert literal.bias.grad is None


def test_literal_pst_replaces_every_prunable_linear_and_trains_nothing_else() -> None:
    model = random_bert("tiny")
    names = {item.name.removesuffix(".weight") for item in prunable_weights(model)}
    trained = replace_linears_(model, rank=2, pattern="2:4", sparsity=0.5)
    assert {name for name, module in model.named_modules() if isinstance(module, LiteralLinear)} == names
    assert len(trained) == 6 * len(names)
    with pytest.raises(PatternError, match="not block:4x4"):
        LiteralLinear(nn.Linear(4, 4), rank=2, pattern="block:4x4", sparsity=0.5)


def test_every_row_trains_and_leaves_the_shared_weights_as_they_are() -> None:
    device = torch.device("cpu")
    base = random_bert("tiny")
    batches = random_batches(base, batch=4, length=8, device=device)[:1]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for spec in row_specs(KINDS, ["unstructured", "2:4"], 0.5, "bf16"):
        training = start(base, spec, batches, device)
        losses = [float(training.step()) for _ in range(4)]
        assert all(0 < loss < 3 for loss in losses), spec
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_table_goals_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    assert train_step.main([*SMALL, "--output", str(output), "--precisions", "tf32", "bf16"]) == output
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(output.read_text())
    names = ["dense", "dense-recorded", "query"]
    names += [f"{kind}-{pattern}" for kind in ("literal", "unrecorded", "pst") for pattern in ("unstructured", "2:4")]
    names += ["taught-2:4"]
    rows = report["rows"]
    assert [(row["precision"], row["row"]) for row in rows] == [(p, name) for p in ("tf32", "bf16") for name in names]
    assert [line.split()[0] for line in printed[1 : 1 + 2 * len(names)]] == names * 2
    assert report["schema_version"] == 1
    assert report["environment"]["command"].startswith("python -m benchmarks.train_step --model-shape tiny")
    assert report["options"]["steps"] == 3
    hidden, layers = 32, 2
    trainable = {row["row"]: row["trainable_parameters"] for row in rows}
    assert trainable["query"] == layers * hidden * hidden
    assert trainable["dense"] == sum(parameter.numel() for parameter in random_bert("tiny").parameters())
    literal = layers * (8 + 8 + 1) * (4 * (hidden + hidden) + 2 * (hidden + 64))
    assert trainable["literal-2:4"] == trainable["literal-unstructured"] == literal
    for row in rows:
        assert row["timed_steps"] == 6
        assert len(row["rounds"]) == 2
        assert 0 < row["step_ms"]["p10"] <= row["step_ms"]["median"] <= row["step_ms"]["p90"]
        assert row["peak_memory_bytes"] is None  # a processor's tensors are not counted
        assert row["sparsity"] == (0.5 if row["pattern"] else 0)
        same = next(other for other in rows if other["row"] == "dense" and other["precision"] == row["precision"])
        assert row["to_dense"]["time"] == row["step_ms"]["median"] / same["step_ms"]["median"]
    goals = report["goals"]
    assert len(goals) == 2 * 3 * 3
    for goal in goals:
        measured = goal["value"] is not None
        assert measured == (goal["what"] == "time")
        expected = ("met" if goal["value"] <= goal["limit"] else "not met") if measured else "not measured"
        assert goal["verdict"] == expected
        assert any(line.startswith(expected) and goal["text"] in line for line in printed)
    assert {goal["limit"] for goal in goals if goal["of"] == "dense" and goal["what"] == "time"} == {1.0, 0.75}


def test_some_rows_alone_have_no_ratio_to_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    arguments = ["--rows", "pst", "--patterns", "unstructured", "--sparsity", "0.9", "--precisions", "fp32"]
    train_step.main([*SMALL, *arguments, "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["row"], row["sparsity"], row["to_dense"], row["to_literal"]) == ("pst-unstructured", 0.9, None, None)
    assert "not measured fp32 pst-unstructured: time - of literal, at most 1/3" in capsys.readouterr().out


def test_profile_prints_operators_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    arguments = [*SMALL, "--output", str(output), "--precisions", "bf16", "--profile"]
    assert train_step.main([*arguments, "pst-2:4"]) is None
    printed = capsys.readouterr().out
    assert printed.startswith("bf16 pst-2:4, 5 steps after 1\n")
    assert "aten::" in printed
    assert not output.exists()
    with pytest.raises(SystemExit, match="the rows are dense, dense-recorded, query, literal-unstructured"):
        train_step.main([*arguments, "pst-1:4"])


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main([*SMALL, "--steps", "0"])
    assert "--steps is 0" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="loss of dense is nan"):
        require_finite(float("nan"), "dense")


def test_the_distribution_is_numpys_percentiles() -> None:
    assert distribution([float(value) for value in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}
