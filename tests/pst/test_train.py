"""Whole runs on tiny models: what they leave, that they learn, and what they refuse."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pst.tasks.classification
import pst.train
from pst import checkpoint, data, metrics
from pst.batches import encode
from pst.config import TrainConfig
from pst.errors import ConfigError, ModelError, PatternError, RunError, StorageError
from pst.models import architecture
from pst.patterns import parse_pattern
from pst.settings import resolve
from pst.tasks.classification import data_spec
from pst.train import train
from tests.conftest import write_reviews
from tests.pst.training import checkpoint_steps, leftovers, log_lines, options, report, tensors, weights

METHODS: dict[str, dict[str, Any]] = {
    "pst": {"sparsity": 0.7},
    "pst 2:4": {"pattern": "2:4"},
    "faithful": {"faithful": True, "sparsity": 0.9},
    "magnitude": {"method": "magnitude", "sparsity": 0.6},
    "magnitude 1:4": {"method": "magnitude", "pattern": "1:4"},
    "dense": {"method": "dense"},
}
REPORT_KEYS = {
    "schema_version", "method", "pattern", "sparsity", "weights", "task", "max_length", "config", "base_model",
    "data", "metrics", "seed", "steps", "seconds", "versions", "git_revision",
    "train_seconds", "peak_memory_bytes", "trainable_parameters", "teacher", "processes",
}  # fmt: skip


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=[(base, method) for base in ("tiny_bert", "tiny_gpt2") for method in METHODS])
def run(
    request: pytest.FixtureRequest, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, Path]:
    """The options and the folder of a finished run of each method on each model."""
    base, method = request.param
    config = options(request.getfixturevalue(base), reviews_file, **METHODS[method])
    output = tmp_path_factory.mktemp("run") / "out"
    train(config, output)
    return config.filled(), output


def test_model_opens_in_transformers_and_scores_what_the_run_says(run: tuple[TrainConfig, Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config, output = run
    model, loading = AutoModelForSequenceClassification.from_pretrained(output / "model", output_loading_info=True)
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    assert tokenizer.model_max_length == report(output)["max_length"] == 64
    tokenizer_file = json.loads((output / "model" / "tokenizer.json").read_text())
    assert tokenizer_file["truncation"] is None
    assert tokenizer_file["padding"] is None
    held_out = data.load(data_spec(config), split="validation")
    with torch.no_grad():
        logits = model.eval()(**tokenizer(held_out.first, padding=True, truncation=True, return_tensors="pt")).logits
    assert metrics.compute("classification", logits.argmax(-1).numpy(), held_out.labels) == report(output)["metrics"]


def test_report_says_what_the_saved_weights_hold(run: tuple[TrainConfig, Path]) -> None:
    config, output = run
    said, saved, base = report(output), tensors(output / "model"), tensors(Path(config.model))
    assert said.keys() == REPORT_KEYS
    assert (said["schema_version"], said["method"], said["pattern"]) == (1, config.method, config.pattern)
    assert said["sparsity"]["requested"] == config.sparsity
    assert (said["base_model"], said["seed"], said["task"]) == (config.model, config.seed, "classification")
    assert said["versions"]["torch"] == torch.__version__
    assert said["data"]["train"]["rows"] + said["data"]["validation"]["rows"] == 64
    assert said["processes"] == 1
    assert 0 < said["train_seconds"] < said["seconds"]
    assert said["peak_memory_bytes"] > 1e7  # of the whole process, or of a GPU
    assert saved.keys() == base.keys()
    kind = json.loads((output / "model" / "config.json").read_text())["model_type"]
    prunable = {name for name in saved if architecture(kind).prunable.search(name.removesuffix(".weight"))}
    prunable = {name for name in prunable if name.endswith(".weight")}
    assert len(prunable) == (12 if kind == "bert" else 8)
    assert {row["name"] for row in said["weights"]} == (set() if config.method == "dense" else prunable)
    zeros = total = low_rank = 0
    for row in said["weights"]:
        weight = saved[row["name"]]
        assert row["shape"] == list(weight.shape)
        assert row["axis"] == (1 if kind == "bert" else 0)
        assert row["density"] == torch.count_nonzero(weight).item() / weight.numel()
        assert parse_pattern(config.pattern).holds(weight.numpy(), axis=row["axis"])
        for part in weight.chunk(architecture(kind).parts(row["name"].removesuffix(".weight")), dim=1 - row["axis"]):
            assert part.numel() - torch.count_nonzero(part) == int(part.numel() * (config.sparsity or 0))
            low_rank += sum(part.shape) * ((config.r1 or 0) + (config.r2 or 0) + 1)  # U, V, A, B, R, C
        zeros, total = zeros + weight.numel() - int(torch.count_nonzero(weight)), total + weight.numel()
    assert said["sparsity"]["measured"] == pytest.approx(zeros / total if total else 0.0)
    others = [saved[name] for name in saved.keys() - prunable]
    trained = [] if config.faithful else [t for name, t in saved.items() if t.ndim == 1 or is_head(name)]
    expected = [*others, *(saved[name] for name in prunable)] if config.method != "pst" else trained
    counted = sum(tensor.numel() for tensor in expected) + (low_rank if config.method == "pst" else 0)
    assert said["trainable_parameters"] == counted
    for name in saved.keys() - prunable:
        trains = config.method != "pst" or (not config.faithful and (saved[name].ndim == 1 or is_head(name)))
        # a parameter that trains may still be without a gradient: a bias of keys has none
        assert trains or torch.equal(saved[name], base[name]), name


def is_head(name: str) -> bool:
    return name.startswith(("classifier.", "score.", "bert.pooler."))


def test_log_and_settings_read_back(run: tuple[TrainConfig, Path]) -> None:
    config, output = run
    assert resolve(TrainConfig, file=output / "config.yaml") == config
    lines = log_lines(output)
    assert [line["step"] for line in lines] == [10, 12, 12]
    assert lines[-1]["eval"] == report(output)["metrics"]
    assert all(math.isfinite(line["loss"]) for line in lines[:-1])
    assert lines[1]["sparsity"] == config.sparsity
    tensorboard = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", "metrics.jsonl", "model", *tensorboard]


def test_tensorboard_shows_what_the_log_holds(run: tuple[TrainConfig, Path]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(run[1] / "tensorboard")).Reload()
    lines = log_lines(run[1])
    for name in ("loss", "sparsity"):
        points = [(event.step, event.value) for event in shown.Scalars(name)]
        assert points == [(line["step"], pytest.approx(line[name])) for line in lines[:-1]]
    for name, value in lines[-1]["eval"].items():
        assert [(event.step, event.value) for event in shown.Scalars(f"eval/{name}")] == [(12, pytest.approx(value))]


def test_the_same_options_give_the_same_weights(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    config = options(tiny_bert, reviews_file)
    torch.manual_seed(99)
    train(config, tmp_path / "a")
    np.random.seed(5)
    train(config, tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    train(options(tiny_bert, reviews_file, seed=1), tmp_path / "c")
    assert weights(tmp_path / "c") != weights(tmp_path / "a")


@pytest.mark.parametrize("name", ["pst", "pst 2:4", "magnitude", "dense"])
def test_evaluating_on_the_way_changes_no_weight(
    name: str, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    base = options(tiny_bert, reviews_file, **METHODS[name], checkpoint_every=0, mask_every=3)
    train(base, tmp_path / "without")
    options_with = {**METHODS[name], "checkpoint_every": 4, "mask_every": 3, "eval_every": 1}
    result = train(options(tiny_bert, reviews_file, **options_with), tmp_path / "with")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    evaluated = [line["step"] for line in log_lines(tmp_path / "with") if "eval" in line]
    assert evaluated == list(range(1, 13))
    assert result.metrics == log_lines(tmp_path / "without")[-1]["eval"]


@pytest.mark.parametrize(
    "changes", [{"method": "dense", "lr": 2e-3}, {"sparsity": 0.5, "lr": 5e-3, "lr_update": 2e-3}], ids=["dense", "pst"]
)
def test_it_learns(changes: dict[str, Any], tiny_bert: Path, tmp_path: Path) -> None:
    reviews = write_reviews(tmp_path / "reviews.jsonl", rows=600, seed=3)
    held_out = write_reviews(tmp_path / "held_out.jsonl", rows=200, seed=4)
    config = options(
        tiny_bert, reviews, **changes, validation=str(held_out), steps=0, epochs=4.0, batch_size=16, max_length=24
    )
    result = train(config, tmp_path / "out")
    assert result.metrics["accuracy"] > 0.85
    assert result.steps == math.ceil(4 * math.ceil(600 / 16))


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_two_sentences_reach_the_model_as_a_pair(
    base: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    rows = [
        {"premise": "the film is lovely", "hypothesis": f"it is {word}", "label": label}
        for word, label in zip(random.permutation(["superb", "dull"] * 20).tolist(), [1, 0] * 20, strict=True)
    ]
    seen: list[dict[str, Any]] = []

    def spy(*args: Any, **named: Any) -> Any:
        encoded = encode(*args, **named)
        seen.append(encoded.columns)
        return encoded

    monkeypatch.setattr(pst.tasks.classification, "encode", spy)
    config = options(request.getfixturevalue(base), rows_file(tmp_path / "pairs.jsonl", rows), validation_fraction=0.3)
    train(config, tmp_path / "out")
    assert "accuracy" in report(tmp_path / "out")["metrics"]
    assert seen[0]["token_type_ids"][0] == [0] * 6 + [1] * 4  # [CLS] a b c d [SEP] | e f g [SEP]


@pytest.mark.parametrize("method", ["pst", "dense"])
def test_regression(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = tmp_path / "base"  # without a head, so that a new one with a single output is made
    headless(tiny_bert, base)
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(["lovely", "dull"], 4)), "score": value / 7} for value in range(40)]
    config = options(base, rows_file(tmp_path / "scores.jsonl", rows), method=method, validation_fraction=0.3)
    result = train(config, tmp_path / "out")
    assert result.metrics.keys() == {"pearson", "spearman", "mse"}
    assert report(tmp_path / "out")["task"] == "regression"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.num_labels == 1
    assert model.config.problem_type == "regression"


def headless(source: Path, target: Path) -> None:
    """Save the body of the BERT in *source* without its classifier."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(source).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def test_a_new_head_takes_the_names_of_the_labels(tiny_bert: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    headless(tiny_bert, base)
    words = {"bad": "awful", "middling": "story", "good": "superb"}
    rows = [
        {"sentence": f"{word} plot {index % 5} {FILL[index]}", "label": name} for index, (name, word) in rowed(words)
    ]
    config = options(base, rows_file(tmp_path / "named.jsonl", rows), validation_fraction=0.3)
    train(config, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert made["id2label"] == {"0": "bad", "1": "good", "2": "middling"}
    assert tensors(tmp_path / "out" / "model")["classifier.weight"].shape == (3, 32)


FILL = [a + " " + b for a in ("the", "a", "of", "and", "war", "love") for b in ("film", "plot", "actor", "scene", "it")]


def rowed(words: dict[str, str]) -> list[tuple[int, tuple[str, str]]]:
    return [(index, list(words.items())[index % len(words)]) for index in range(30)]


def test_a_head_that_fits_is_kept(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    train(options(tiny_bert, reviews_file, faithful=True), tmp_path / "out")
    made = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert made["id2label"] == {"0": "NEGATIVE", "1": "POSITIVE"}
    base, saved = tensors(tiny_bert), tensors(tmp_path / "out" / "model")
    assert torch.equal(saved["classifier.weight"], base["classifier.weight"])


def test_a_result_trains_further(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    train(options(tiny_bert, reviews_file, method="dense"), tmp_path / "first")
    train(options(tmp_path / "first" / "model", reviews_file, pattern="2:4"), tmp_path / "second")
    assert report(tmp_path / "second")["sparsity"] == {"requested": 0.5, "measured": 0.5}


# -- what it refuses -----------------------------------------------------------------------------------------------


def test_an_existing_result_is_kept_unless_told_otherwise(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(options(tiny_bert, reviews_file, checkpoint_every=2), output)
    before = weights(output)
    with pytest.raises(RunError, match=r"already holds a result, which is kept; .*--overwrite"):
        train(options(tiny_bert, reviews_file, seed=1), output)
    assert weights(output) == before
    train(options(tiny_bert, reviews_file, seed=1), output, overwrite=True)
    assert weights(output) != before
    assert len(log_lines(output)) == 3


def test_a_bad_option_loses_nothing_even_with_overwrite(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(options(tiny_bert, reviews_file), output)
    before = sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (PatternError, {"pattern": "3:5"}),
        (ModelError, {"max_length": 65}),
        (ConfigError, {"sparsity_warmup": 0.8}),
        (ConfigError, {"device": "cudafoo"}),
    ]
    for error, changes in bad:
        with pytest.raises(error):
            train(options(tiny_bert, reviews_file, **changes), output, overwrite=True)
    with pytest.raises(ModelError, match="does not exist"):
        train(options(tmp_path / "nothing" / "here", reviews_file), output, overwrite=True)
    assert sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*")) == before


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_output_that_cannot_be_a_folder(place: str, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" if place == "file" else tmp_path / "file" / "out"
    with pytest.raises((RunError, StorageError), match=r"is a file|cannot be written"):
        train(options(tiny_bert, reviews_file), output)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sees no GPU"):
        train(options(tiny_bert, reviews_file, device="cuda"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pst", "pst 2:4", "magnitude", "dense"])
def test_divergence_is_an_error_and_no_checkpoint_holds_it(
    name: str, tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pst.train, "_rate", lambda step, steps, warmup: 1.0 if step < 7 else 1e38)
    config = options(tiny_bert, reviews_file, **METHODS[name], checkpoint_every=1)
    with pytest.raises(RunError, match=r"diverged: .* at step \d+\. Start again with a lower lr.* are kept in "):
        train(config, tmp_path / "out")
    newest = checkpoint.load_last(tmp_path / "out" / "checkpoints")
    assert newest is not None
    assert newest["step"] >= 7
    assert all(bool(torch.isfinite(value).all()) for value in newest["model"].values() if value.is_floating_point())
    assert not (tmp_path / "out" / "model").exists()


def test_divergence_at_the_last_step_gives_no_result(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pst.train, "_rate", lambda step, steps, warmup: 1.0 if step < 11 else math.inf)
    with pytest.raises(RunError, match="at step 12"):
        train(options(tiny_bert, reviews_file, method="dense"), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_a_loss_that_overflows_stops_at_the_first_step(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model.classifier.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "large")
    with pytest.raises(RunError, match=r"at step 0\. Start again with a lower lr, lr_update or lr_scores\.$"):
        train(options(tmp_path / "large", reviews_file), tmp_path / "out")
    assert checkpoint_steps(tmp_path / "out") == []


def test_a_run_leaves_no_unfinished_files_and_clears_those_of_a_kill(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / ".model.partial-1").mkdir(parents=True)
    (output / ".metrics.jsonl.partial-99999999").write_text("half")
    train(options(tiny_bert, reviews_file, checkpoint_every=2), output, overwrite=True)
    assert leftovers(output) == []


def test_rows_can_be_given_ready(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    config = options(tiny_bert, reviews_file)
    whole = data.load_whole(data_spec(config))
    train(config, tmp_path / "out", examples=(whole.subset(range(40)), whole.subset(range(40, 64))))
    said = report(tmp_path / "out")["data"]
    assert (said["train"]["rows"], said["validation"]["rows"]) == (40, 24)
