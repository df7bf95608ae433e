"""pst prune: what goes is what the formulas say, and the result is an ordinary model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pst.data import DataSpec
from pst.errors import ConfigError, DataError, ModelError, PatternError, RunError
from pst.patterns import parse_pattern
from pst.prune import Pruned, prune
from pst.sparsify import prunable_weights
from tests.command_line import pst
from tests.conftest import save_tokenizer
from tests.pst.oracle import keep_highest, keep_n_of_m

Load = Callable[[Path], nn.Module]


@pytest.fixture
def load() -> Load:
    def from_folder(folder: Path) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")
        return model.eval()

    return from_folder


def matrices(model: nn.Module) -> dict[str, list[Tensor]]:
    """Each prunable matrix as (n, k), by the name of its weight."""
    return {
        item.name: [piece if item.axis == 1 else piece.T for piece in item.matrices()]
        for item in prunable_weights(model)
    }


def inputs_of(model: nn.Module, folder: Path, rows: list[str]) -> dict[str, Tensor]:
    """The inputs X (tokens, k) of every prunable weight, one text at a time, so without padding."""
    from transformers import AutoTokenizer

    tokenizer, seen = AutoTokenizer.from_pretrained(folder), dict[str, list[Tensor]]()

    def record(name: str) -> Any:
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]))

    hooks = [item.module.register_forward_pre_hook(record(item.name)) for item in prunable_weights(model)]
    with torch.no_grad():
        for text in rows:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def texts(path: Path) -> list[str]:
    return [json.loads(line)["sentence"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_magnitude_keeps_the_largest_of_each_matrix(
    base: str, load: Load, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    result = prune(folder, tmp_path / "out", sparsity=0.6)
    before, after = load(folder), load(tmp_path / "out")
    for name, pieces in matrices(before).items():
        for piece, pruned in zip(pieces, matrices(after)[name], strict=True):
            assert torch.equal(pruned, piece * keep_highest(piece.abs(), 0.6))
    names = set(matrices(before))
    for (name, one), other in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(one, other) is (name not in names), name
    assert result == Pruned(
        model=tmp_path / "out", pattern="unstructured", method="magnitude", sparsity=result.sparsity, errors={}
    )
    assert result.sparsity == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_wanda_keeps_the_largest_products_of_weight_and_input_norm(
    base: str, load: Load, request: pytest.FixtureRequest, tmp_path: Path, reviews_file: Path
) -> None:
    folder = request.getfixturevalue(base)
    result = prune(folder, tmp_path / "out", pattern="2:4", data=DataSpec(data=str(reviews_file)), rows=1000)
    before, after = load(folder), load(tmp_path / "out")
    X = inputs_of(before, folder, texts(reviews_file))
    for name, pieces in matrices(before).items():
        norms = X[name].double().norm(dim=0)
        lost = whole = 0.0
        for piece, pruned in zip(pieces, matrices(after)[name], strict=True):
            scores = piece.double().abs() * norms
            assert torch.equal(pruned, piece * keep_n_of_m(scores.contiguous(), 2, 4).float())
            lost += float((X[name] @ (pruned - piece).T).double().square().sum())
            whole += float((X[name] @ piece.T).double().square().sum())
        assert result.errors[name] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    report = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert {row["name"]: row["output_error"] for row in report["weights"]} == result.errors
    assert report["calibration"]["rows"] == 64
    assert report["method"] == "wanda"


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("unstructured", 0.7), ("block:4x4", 0.5)])
def test_compensation_keeps_the_zeros_and_the_outputs_nearer(
    pattern: str, sparsity: float | None, tiny_bert: Path, tmp_path: Path, reviews_file: Path, load: Load
) -> None:
    options: dict[str, Any] = {"pattern": pattern, "sparsity": sparsity, "data": DataSpec(data=str(reviews_file))}
    plain = prune(tiny_bert, tmp_path / "plain", **options)
    adjusted = prune(tiny_bert, tmp_path / "adjusted", **options, adjust=True)
    assert set(plain.errors) == set(adjusted.errors)
    assert all(adjusted.errors[name] < error for name, error in plain.errors.items())
    one, other = matrices(load(tmp_path / "plain")), matrices(load(tmp_path / "adjusted"))
    for name, pieces in one.items():
        assert torch.equal(pieces[0] == 0, other[name][0] == 0)
        assert not torch.equal(pieces[0], other[name][0])


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("unstructured", 0.7)])
def test_alps_is_nearer_than_wanda_compensated(
    pattern: str, sparsity: float | None, tiny_bert: Path, tmp_path: Path, reviews_file: Path, load: Load
) -> None:
    options: dict[str, Any] = {"pattern": pattern, "sparsity": sparsity, "data": DataSpec(data=str(reviews_file))}
    wanda = prune(tiny_bert, tmp_path / "wanda", **options, adjust=True)
    alps = prune(tiny_bert, tmp_path / "alps", **options, method="alps")
    assert alps.sparsity == wanda.sparsity
    assert sum(alps.errors.values()) < 0.97 * sum(wanda.errors.values())
    one, other = matrices(load(tmp_path / "wanda")), matrices(load(tmp_path / "alps"))
    for name, pieces in one.items():
        assert (pieces[0] == 0).sum() == (other[name][0] == 0).sum()
        assert parse_pattern(pattern).holds(other[name][0].numpy(), axis=1)
    report = json.loads((tmp_path / "alps" / "sparsity.json").read_text())
    assert (report["method"], report["compensated"]) == ("alps", True)


def test_a_language_model_a_text_file_and_a_global_budget(tmp_path: Path) -> None:
    from pst.scratch import make_gpt2

    lines = [f"the {adjective} film was {verdict} ." for adjective in ("long", "odd") for verdict in ("good", "bad")]
    (tmp_path / "text.txt").write_text("\n\n".join(lines * 4), encoding="utf-8")
    make_gpt2(tmp_path / "gpt2", lines, layers=2, width=32, heads=2, vocabulary=300, positions=32, seed=0)
    data = DataSpec(data=str(tmp_path / "text.txt"))
    result = prune(tmp_path / "gpt2", tmp_path / "out", sparsity=0.5, data=data, budget="global", max_length=16)
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    report = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    densities = {row["density"] for row in report["weights"]}
    assert len(densities) > 1  # the weights competed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_a_pruned_model_is_exported_and_inspected_like_a_trained_one(
    tiny_bert: Path, tmp_path: Path, reviews_file: Path
) -> None:
    done = pst(
        "prune", tiny_bert, "--pattern", "2:4", "--data", reviews_file, "--compensate", "--output", tmp_path / "p"
    )
    assert done.code == 0, done.err
    assert done.out.startswith(f"{tmp_path / 'p'}: 2:4 by wanda, 50.0% zeros in the pruned weights\n")
    assert "outputs of a pruned layer change by" in done.out
    exported = pst("export", tmp_path / "p", "--output", tmp_path / "artifact")
    assert exported.code == 0, exported.err
    rows = json.loads((tmp_path / "artifact" / "export.json").read_text())["weights"]
    assert len(rows) == 12
    assert all(row["density"] == pytest.approx(0.5) for row in rows)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 0.5, "method": "wanda"}, ConfigError, "--method wanda looks at the inputs.*--data"),
        ({"sparsity": 0.5, "adjust": True}, ConfigError, "--compensate looks at the inputs.*--data"),
        ({"sparsity": 0.5, "method": "alps"}, ConfigError, "--method alps looks at the inputs.*--data"),
        ({"pattern": "structured", "sparsity": 0.5, "method": "alps"}, ConfigError, "alps is for patterns of zeros"),
        ({"sparsity": 0.5, "method": "pst"}, ConfigError, "Unknown method 'pst'.*pst train"),
        ({}, ConfigError, "needs a sparsity, for example --sparsity 0.5"),
        ({"pattern": "2:4", "sparsity": 0.9}, ConfigError, "has sparsity 0.5, but 0.9 was asked for"),
        ({"pattern": "3:5"}, PatternError, "5 does not divide"),
        ({"pattern": "2:4", "budget": "global"}, PatternError, "use --set budget=local"),
        ({"sparsity": 1.5}, PatternError, r"outside \[0, 1\)"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], error: type[Exception], message: str, tiny_bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        prune(tiny_bert, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_way_and_what_cannot_be_read(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"sentence": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match="holds no row with text"):
        prune(tiny_bert, tmp_path / "out", sparsity=0.5, data=DataSpec(data=str(tmp_path / "empty.jsonl")))
    with pytest.raises(ModelError, match="does not exist"):
        prune(tmp_path / "nothing", tmp_path / "out", sparsity=0.5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="--overwrite"):
        prune(tiny_bert, tmp_path / "out", sparsity=0.5)
    assert (tmp_path / "out" / "note").read_text(encoding="utf-8") == "mine"


def test_an_encoder_with_a_decoder_is_pruned_without_text_alone(tmp_path: Path, reviews_file: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    folder, size = tmp_path / "t5", save_tokenizer(tmp_path / "t5", model_max_length=64)
    T5ForConditionalGeneration(
        T5Config(vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ).save_pretrained(folder)
    with pytest.raises(ModelError, match="has an encoder and a decoder, which need more than text; leave --data out"):
        prune(folder, tmp_path / "out", sparsity=0.5, data=DataSpec(data=str(reviews_file)))
    found = prune(folder, tmp_path / "out", sparsity=0.5)
    assert found.sparsity == pytest.approx(0.5, abs=0.01)
