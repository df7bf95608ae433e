"""``pst train`` and ``pst prune`` with pattern structured: what they leave, what goes on from it, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pst.callback import PSTCallback
from pst.config import TrainConfig
from pst.data import DataSpec
from pst.errors import ConfigError, PatternError
from pst.prune import prune
from pst.structured.storage import load_structured
from pst.structured.units import find_units
from pst.train import train
from tests.pst.structured.models import logits, make
from tests.pst.training import options, report


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(
        tmp_path_factory.mktemp("base"), "bert", id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1}
    )
    return folder


def structured(base: Path, data: Path, **changes: Any) -> TrainConfig:
    return options(base, data, **({"pattern": "structured", "sparsity": 0.4} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": 32},
        {"calibration": 0, "budget": "local"},
        {"method": "magnitude", "structured_target": "parameters"},
        {"method": "movement", "structured_units": "heads", "sparsity": 0.3},
    ],
    ids=["calibrated", "local", "magnitude", "movement"],
)
def test_a_run_leaves_a_smaller_model_and_says_so(
    base: Path, reviews_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    train(structured(base, reviews_file, **changes), tmp_path / "run")
    found = report(tmp_path / "run")
    asked = changes.get("sparsity", 0.4)
    assert found["pattern"] == "structured"
    assert found["sparsity"]["requested"] == asked
    assert asked <= found["sparsity"]["measured"] < asked + 0.2
    counted = found["structured"][changes.get("structured_target", "macs")]
    assert found["sparsity"]["measured"] == 1 - counted["kept"] / counted["dense"]
    assert [row["density"] for row in found["weights"]] == [1.0] * 12
    model = load_structured(tmp_path / "run")
    assert model.config.structured == found["structured"]
    assert {row["name"]: row["shape"] for row in found["weights"]} == {
        name: list(value.shape)
        for name, value in model.state_dict().items()
        if name in {w["name"] for w in found["weights"]}
    }
    if changes.get("budget") == "local":
        layers = found["structured"]["layers"]
        assert len({(len(layer["heads"]), layer["neurons"]) for layer in layers}) == 1


def test_training_goes_on_from_what_is_left(base: Path, reviews_file: Path, tmp_path: Path) -> None:
    train(structured(base, reviews_file), tmp_path / "first")
    first = load_structured(tmp_path / "first")
    small = str(tmp_path / "first" / "model")
    train(options(Path(small), reviews_file, method="dense", teacher=small), tmp_path / "tuned")
    tuned = load_structured(tmp_path / "tuned")
    assert tuned.config.structured == first.config.structured
    assert not torch.equal(logits(tuned), logits(first))
    train(options(Path(small), reviews_file, pattern="2:4"), tmp_path / "both")
    both = load_structured(tmp_path / "both")
    weight = both.bert.encoder.layer[0].output.dense.weight
    assert weight.shape == first.bert.encoder.layer[0].output.dense.weight.shape
    assert int((weight == 0).sum()) == weight.numel() // 2
    with pytest.raises(PatternError, match="has no zeros to keep"):
        train(TrainConfig(model=small, data=str(reviews_file), method="fixed_mask", steps=2), tmp_path / "fixed")


def test_pruning_without_training(base: Path, reviews_file: Path, tmp_path: Path) -> None:
    result = prune(
        base, tmp_path / "small", pattern="structured", sparsity=0.4, adjust=True, data=DataSpec(data=str(reviews_file))
    )
    assert 0.4 <= result.sparsity < 0.6
    content = json.loads((tmp_path / "small" / "sparsity.json").read_text())
    assert content["structured"]["macs"]["kept"] <= 0.6 * content["structured"]["macs"]["dense"]
    changed = {name: error for name, error in result.errors.items() if error > 0}
    assert changed.keys() <= {row["name"] for row in content["weights"] if "output.dense" in row["name"]}
    assert changed
    plain = prune(base, tmp_path / "plain", pattern="structured", sparsity=0.4)
    assert plain.errors == {}
    assert logits(load_structured(tmp_path / "plain")).isfinite().all()


def test_the_callback_removes_at_the_end(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    callback = PSTCallback(model, pattern="structured", sparsity=0.4)
    state, control = transformers.TrainerState(global_step=3, max_steps=3), transformers.TrainerControl()
    callback.on_train_end(None, state, control)
    callback.save(tmp_path / "out")
    assert sum(one.count for one in find_units(load_structured(tmp_path / "out"))) < 2 * (4 + 64)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sparsity": None}, "Pattern structured needs a sparsity"),
        ({"structured_multiple": 0}, "structured_multiple is 0; it must be at least 1"),
    ],
)
def test_options_that_no_run_could_use(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        structured(Path("m"), Path("d"), **changes).filled()
