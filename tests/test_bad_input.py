"""Bad input through the command line: one clear message with its remedy, exit code 2, nothing lost, nothing left."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from .command_line import done, interrupted_run, pst, pst_process, snapshot

Refused = Callable[..., str]
TRAIN = ("--sparsity", "0.5", "--steps", "4", "--set", "batch_size=8", "--set", "r1=2", "--set", "r2=2")
LONGEST = 600  # characters: three lines of a wide terminal, with pytest's long paths


@pytest.fixture(scope="module")
def model(sparse_model: Callable[..., Path]) -> Path:
    """A 2:4 model folder. Read only."""
    return sparse_model("2:4")


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact. Read only; ``artifact`` is a copy that a test may damage."""
    output = tmp_path_factory.mktemp("exported") / "artifact"
    done("export", model, "--output", output)
    return output


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy of the artifact."""
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def external(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that keeps its weights in model.onnx.data. Read only."""
    output = tmp_path_factory.mktemp("external") / "artifact"
    done("export", model, "--output", output, "--external-data")
    return output


@pytest.fixture(scope="module")
def stopped_run(tiny_bert: Path, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted. Read only; ``interrupted`` is a copy."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    interrupted_run(output, "--model", tiny_bert, "--data", reviews_file, *TRAIN)
    return output


@pytest.fixture
def interrupted(stopped_run: Path, tmp_path: Path) -> Path:
    """A copy of an interrupted run with checkpoints of the steps 1 and 2 of 4."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """``refused("eval", ..., says="remedy")`` runs the command in tmp_path, checks how it fails, gives its message."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: str | Path, says: str | tuple[str, ...], runs_until_failure: bool = False) -> str:
        before = snapshot(tmp_path)
        outcome = pst(*arguments)
        lines = outcome.err.splitlines()
        message = lines[-1] if lines else ""
        assert outcome.code == 2, outcome
        assert outcome.out == ""
        assert message.startswith("Error: ")
        assert sum(line.startswith("Error") for line in lines) == 1, outcome.err
        assert "Traceback" not in outcome.err
        assert runs_until_failure or len(lines) == 1, outcome.err
        assert len(message) <= LONGEST, message
        for words in (says,) if isinstance(says, str) else says:
            assert words in message
        assert snapshot(tmp_path) == before
        return message

    return check


def rows(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def train(model: Path | str, data: Path | str, *more: str | Path) -> tuple[str | Path, ...]:
    return ("train", "--model", model, "--data", data, "--output", "new", *TRAIN, *more)


# -- data ----------------------------------------------------------------------------------------------------------


def test_missing_data_file(refused: Refused, tiny_bert: Path) -> None:
    refused(*train(tiny_bert, "nowhere.jsonl"), says=("nowhere.jsonl does not exist", "give a data file"))


def test_missing_data_file_of_eval(refused: Refused, exported: Path) -> None:
    refused("eval", exported, "--data", "nowhere.csv", says="nowhere.csv does not exist")


def test_empty_data_file(refused: Refused, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(*train(tiny_bert, "empty.jsonl"), says=("empty.jsonl is empty", "rows of text and labels"))


def test_file_with_a_header_alone(refused: Refused, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text("text,label\n", encoding="utf-8")
    refused(*train(tiny_bert, "header.csv"), says=("header.csv has no rows", "give a file"))


def test_data_of_an_unknown_kind(refused: Refused, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "reviews.xlsx").write_bytes(b"PK")
    refused(*train(tiny_bert, "reviews.xlsx"), says=("unsupported ending", ".csv"))


def test_text_column_not_there(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--set", "text_columns=body"), says=("body", "sentence, label"))


def test_label_column_not_there(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--set", "label_column=mood"), says=("mood", "sentence, label"))


def test_label_column_not_there_in_eval(refused: Refused, exported: Path, reviews_file: Path) -> None:
    arguments = ("eval", exported, "--data", reviews_file, "--set", "label_column=mood")
    refused(*arguments, says=("mood", "sentence, label"))


def test_one_class(refused: Refused, tiny_bert: Path, tmp_path: Path) -> None:
    rows(tmp_path / "one.jsonl", *[{"text": f"film {number}", "label": 0} for number in range(20)])
    refused(*train(tiny_bert, "one.jsonl"), says=("needs two classes", "add rows"))


def test_more_labels_than_the_checkpoint(refused: Refused, tiny_bert: Path, tmp_path: Path) -> None:
    rows(tmp_path / "three.jsonl", *[{"text": f"film {number}", "label": number % 3} for number in range(60)])
    refused(*train(tiny_bert, "three.jsonl"), says=("more labels than the checkpoint", "use a model with as many"))


def test_more_labels_than_the_artifact(refused: Refused, exported: Path, tmp_path: Path) -> None:
    rows(tmp_path / "three.jsonl", *[{"text": f"film {number}", "label": number % 3} for number in range(60)])
    refused("eval", exported, "--data", "three.jsonl", says=("more labels than", "use a model with as many"))


def test_label_name_that_the_model_does_not_know(refused: Refused, exported: Path, tmp_path: Path) -> None:
    rows(tmp_path / "named.jsonl", {"text": "a film", "label": "lukewarm"}, {"text": "a plot", "label": "POSITIVE"})
    refused("eval", exported, "--data", "named.jsonl", says=("'lukewarm'", "rename it"))


def test_scores_for_a_classification_model(refused: Refused, exported: Path, tmp_path: Path) -> None:
    rows(tmp_path / "scores.jsonl", {"text": "a film", "label": 0.25}, {"text": "a plot", "label": 0.75})
    refused("eval", exported, "--data", "scores.jsonl", says=("holds scores", "label_column"))


def regressor(tiny_bert: Path, folder: Path) -> Path:
    """The tiny BERT with one output, as if trained on scores."""
    from transformers import BertConfig, BertForSequenceClassification

    shutil.copytree(tiny_bert, folder)
    config = BertConfig.from_pretrained(tiny_bert, num_labels=1, problem_type="regression")
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_classes_for_a_regression_model(refused: Refused, tiny_bert: Path, tmp_path: Path) -> None:
    regressor(tiny_bert, tmp_path / "regressor")
    rows(tmp_path / "named.jsonl", {"text": "a film", "label": "good"}, {"text": "a plot", "label": "bad"})
    refused("eval", "regressor", "--data", "named.jsonl", says=("predicts a score", "classification model"))


def test_configuration_of_another_model(refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    mixed = regressor(tiny_bert, tmp_path / "mixed")
    shutil.copy(tiny_bert / "config.json", mixed / "config.json")
    refused("eval", "mixed", "--data", reviews_file, says=("mixes two models", "again"))
    refused("export", "mixed", "--output", "new", says=("mixes two models", "again"))


# -- options -------------------------------------------------------------------------------------------------------


def test_max_length_beyond_the_model(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--set", "max_length=65"), says=("max_length is 65", "at most 64"))


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "nan"])
def test_sparsity_outside_its_range(refused: Refused, tiny_bert: Path, reviews_file: Path, sparsity: str) -> None:
    says = "not a number" if sparsity == "nan" else "outside [0, 1)"
    refused(*train(tiny_bert, reviews_file, "--sparsity", sparsity), says=says)


def test_sparsity_that_the_pattern_contradicts(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--pattern", "1:4"), says=("1:4 has sparsity 0.75", "leave --sparsity out"))


def test_unknown_pattern(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--pattern", "checkers"), says=("'checkers'", "2:4", "unstructured"))


def test_unknown_method(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--method", "wishes"), says=("'wishes'", "dense, magnitude, pst"))


def test_dimension_that_m_does_not_divide(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    arguments = ("train", "--model", tiny_bert, "--data", reviews_file, "--output", "new", "--pattern", "3:5")
    refused(*arguments, says=("bert.encoder.layer.0", "has 32 weights", "5 does not divide", "unstructured"))


def test_model_without_a_prunable_weight(refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shutil.copytree(tiny_bert, tmp_path / "flat", ignore=shutil.ignore_patterns("*.safetensors"))
    config = BertConfig.from_pretrained(tiny_bert)
    config.num_hidden_layers = 0
    BertForSequenceClassification(config).save_pretrained(tmp_path / "flat")
    refused(*train(Path("flat"), reviews_file), says=("no prunable weight", "Choose another model"))


def test_no_model_no_data_no_sparsity(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused("train", "--data", reviews_file, "--output", "new", says=("No model", "--model"))
    refused("train", "--model", tiny_bert, "--output", "new", says=("No data", "--data"))
    arguments = ("train", "--model", tiny_bert, "--data", reviews_file, "--output", "new")
    refused(*arguments, says=("needs a sparsity", "--sparsity 0.9"))


def test_unknown_setting(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--set", "batchsize=8"), says=("'batchsize'", "did you mean 'batch_size'"))


def test_unknown_setting_of_eval(refused: Refused, exported: Path, reviews_file: Path) -> None:
    arguments = ("eval", exported, "--data", reviews_file, "--set", "textcolumn=body")
    refused(*arguments, says=("'textcolumn'", "did you mean 'text_columns'"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("batch_size", "not of the form key=value"),
        ("=8", "not of the form key=value"),
        ("batch_size=eight", "not a whole number"),
        ("batch_size=0", "must be at least 1"),
        ("validation_fraction=1", "between 0 and 1"),
        ("device=tpu", "auto, cpu, or cuda"),
        ("lr=-1", "at least 0"),
    ],
)
def test_bad_setting(refused: Refused, tiny_bert: Path, reviews_file: Path, setting: str, says: str) -> None:
    refused(*train(tiny_bert, reviews_file, "--set", setting), says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sparsity: [0.5", "not valid YAML"),
        ("- sparsity", "one 'key: value' a line"),
        ("sparsty: 0.5", "did you mean 'sparsity'"),
        ("sparsity: high", "not a number"),
        ("steps: 1\nsteps: 2", "there twice"),
    ],
)
def test_bad_configuration_file(refused: Refused, tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "train.yaml").write_text(content + "\n", encoding="utf-8")
    refused("train", "--config", "train.yaml", "--output", "new", says=("train.yaml", says))


def test_missing_configuration_file(refused: Refused) -> None:
    refused("train", "--config", "nowhere.yaml", "--output", "new", says=("nowhere.yaml does not exist", "--config"))


@pytest.mark.parametrize("shapes", ["", "8", "8x", "ax16", "1x-2", "8*16", "1x16;2x16"])
def test_shapes_that_are_none(refused: Refused, exported: Path, shapes: str) -> None:
    refused("bench", exported, "--shapes", shapes, "--output", "report", says=("is not a shape", "1x32,8x128"))


def test_empty_shape(refused: Refused, exported: Path) -> None:
    refused("bench", exported, "--shapes", "0x16", "--output", "report", says="start at 1")


def test_shape_longer_than_the_model(refused: Refused, exported: Path) -> None:
    refused("bench", exported, "--shapes", "1x65", "--output", "report", says=("64 tokens", "--shapes"))


def test_unknown_format(refused: Refused, model: Path) -> None:
    refused("export", model, "--format", "gguf", "--output", "new", says=("'gguf'", "--format onnx"))


@pytest.mark.parametrize("opset", ["3", "99"])
def test_opset_that_cannot_be_written(refused: Refused, model: Path, opset: str) -> None:
    refused("export", model, "--opset", opset, "--output", "new", says=(f"Opset {opset}", "choose 17"))


def test_negative_tolerance(refused: Refused, model: Path) -> None:
    refused("export", model, "--atol", "-1", "--output", "new", says=("--atol", "at least 0"))


def test_tolerance_that_no_export_meets(refused: Refused, model: Path) -> None:
    arguments = ("export", model, "--atol", "0", "--rtol", "0", "--output", "new")
    refused(*arguments, says="--atol", runs_until_failure=True)


def test_unknown_engine(refused: Refused, exported: Path, reviews_file: Path) -> None:
    refused("eval", exported, "--data", reviews_file, "--engine", "tea", says=("tea is not an engine", "onnxruntime"))
    refused("bench", exported, "--engine", "tea", "--shapes", "1x8", "--output", "report", says="tea is not an engine")
    refused("serve", exported, "--engine", "tea", "--port", "0", says="tea is not an engine")


def test_the_same_artifact_twice(refused: Refused, exported: Path) -> None:
    refused("bench", exported, exported, "--shapes", "1x8", "--output", "report", says="given twice")


# -- folders that are not what they should be ----------------------------------------------------------------------


def test_missing_model(refused: Refused, reviews_file: Path) -> None:
    refused(*train("./nowhere", reviews_file), says=("nowhere does not exist", "Hugging Face folder"))
    refused("export", "nowhere", "--output", "new", says="nowhere")
    refused("eval", "nowhere", "--data", reviews_file, says="nowhere does not exist")
    refused("bench", "nowhere", "--output", "report", says="nowhere does not exist")
    refused("inspect", "nowhere", says="nowhere does not exist")
    refused("serve", "nowhere", "--port", "0", says="nowhere does not exist")


def test_folder_without_a_model(refused: Refused, reviews_file: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("a cat", encoding="utf-8")
    refused(*train(Path("photos"), reviews_file), says=("photos has no config.json", "Hugging Face folder"))
    refused("export", "photos", "--output", "new", says="config.json")
    refused("eval", "photos", "--data", reviews_file, says="config.json")
    refused("bench", "photos", "--output", "report", says="config.json")
    refused("inspect", "photos", says="not a model")
    refused("serve", "photos", "--port", "0", says="config.json")


def test_run_that_is_not_finished(refused: Refused, interrupted: Path, reviews_file: Path) -> None:
    refused("export", "run", "--output", "new", says=("without a finished model", "--resume"))


def test_model_with_truncated_weights(refused: Refused, model: Path, reviews_file: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    truncate(tmp_path / "model" / "model.safetensors")
    refused(*train(Path("model"), reviews_file), says=("weights of model", "Get the model again"))
    refused("export", "model", "--output", "new", says=("cut off", "again"), runs_until_failure=True)
    refused("eval", "model", "--data", reviews_file, says=("cannot be opened", "again"))
    refused("inspect", "model", says=("cut off", "again"))


def test_model_with_a_damaged_report(refused: Refused, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "sparsity.json").write_text('{"schema_version": 1, "weights"', encoding="utf-8")
    refused("export", "model", "--output", "new", says=("sparsity.json", "again"))


def test_weights_that_break_the_claimed_pattern(refused: Refused, model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    row = tensors["bert.encoder.layer.1.output.dense.weight"][3]
    row[0:4], row[4:8] = 0.0, 1.0  # as many zeros as before, and a group of four that has none
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    says = ("bert.encoder.layer.1.output.dense.weight", "2:4")
    refused("export", "model", "--output", "new", says=says, runs_until_failure=True)


# -- output folders ------------------------------------------------------------------------------------------------


def test_output_that_holds_a_run(refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    again = ("train", "--model", tiny_bert, "--data", reviews_file, *TRAIN, "--output", "run")
    done(*again)
    before = snapshot(tmp_path / "run")
    refused(*again, says=("run already holds a result, which is kept", "--overwrite"))
    done(*again, "--seed", "1", "--overwrite")
    after = snapshot(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["model/model.safetensors"] != before["model/model.safetensors"]


def test_output_that_holds_an_interrupted_run(
    refused: Refused, interrupted: Path, tiny_bert: Path, reviews_file: Path
) -> None:
    again = ("train", "--model", tiny_bert, "--data", reviews_file, *TRAIN, "--output", "run")
    refused(*again, says=("not finished, which is kept", "--resume", "--overwrite"))


def test_output_that_holds_something_else(refused: Refused, model: Path, tiny_bert: Path, reviews_file: Path) -> None:
    Path("new").mkdir()
    Path("new/thesis.txt").write_text("years of work", encoding="utf-8")
    refused(*train(tiny_bert, reviews_file), says=("which is kept", "--overwrite"))
    refused(*train(tiny_bert, reviews_file, "--resume"), says="which is kept")
    refused("export", model, "--output", "new", says=("which is kept", "--overwrite"))


def test_output_that_is_a_file(
    refused: Refused, model: Path, exported: Path, tiny_bert: Path, reviews_file: Path
) -> None:
    Path("new").write_text("a file", encoding="utf-8")
    refused(*train(tiny_bert, reviews_file), says=("new is a file", "wants a folder"))
    refused("export", model, "--output", "new", says=("new is a file", "wants a folder"))
    refused("bench", exported, "--shapes", "1x8", "--output", "new", says=("new is a file", "wants a folder"))


def test_output_below_a_file(refused: Refused, exported: Path, tiny_bert: Path, reviews_file: Path) -> None:
    Path("file").write_text("a file", encoding="utf-8")
    arguments = ("train", "--model", tiny_bert, "--data", reviews_file, *TRAIN, "--output", "file/run")
    refused(*arguments, says=("cannot be written", "another folder"))
    refused("bench", exported, "--shapes", "1x8", "--output", "file/report", says="cannot be written")
    refused("eval", exported, "--data", reviews_file, "--predictions", "file/rows.jsonl", says="cannot be written")


def test_output_that_holds_an_artifact(refused: Refused, model: Path, artifact: Path) -> None:
    refused("export", model, "--output", "artifact", says=("already holds a result, which is kept", "--overwrite"))
    before = snapshot(artifact)
    done("export", model, "--output", "artifact", "--external-data", "--overwrite")
    assert set(snapshot(artifact)) == {*before, "model.onnx.data"}


def test_output_that_holds_a_report(refused: Refused, exported: Path) -> None:
    again = ("bench", exported, "--shapes", "1x8", "--runs", "2", "--output", "report")
    done(*again)
    refused(*again, says=("which is kept", "--overwrite"))
    done(*again, "--overwrite")


def test_failed_export_keeps_the_artifact_that_was_there(refused: Refused, model: Path, artifact: Path) -> None:
    arguments = ("export", model, "--output", "artifact", "--overwrite", "--atol", "0", "--rtol", "0")
    refused(*arguments, says="--atol", runs_until_failure=True)


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--seed", "1"), "seed was 0, now 1"),
        (("--sparsity", "0.25"), "sparsity was 0.5, now 0.25"),
        (("--pattern", "2:4"), "pattern was 'unstructured', now '2:4'"),
        (("--set", "batch_size=4"), "batch_size was 8, now 4"),
    ],
)
def test_checkpoint_of_another_configuration(
    refused: Refused, interrupted: Path, change: tuple[str, ...], says: str
) -> None:
    refused("train", "--resume", "--output", "run", *change, says=("another configuration", says, "--resume alone"))


def test_checkpoint_of_other_data(refused: Refused, interrupted: Path, reviews_file: Path) -> None:
    lines = reviews_file.read_text(encoding="utf-8").splitlines(keepends=True)
    Path("fewer.jsonl").write_text("".join(lines[:-8]), encoding="utf-8")
    arguments = ("train", "--resume", "--output", "run", "--data", "fewer.jsonl")
    refused(*arguments, says=("another configuration", "data was"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
def test_no_checkpoint_can_be_read(refused: Refused, interrupted: Path, damage: str) -> None:
    for file in (interrupted / "checkpoints").iterdir():
        harm(file, damage)
    arguments = ("train", "--resume", "--output", "run")
    refused(*arguments, says=("No checkpoint in", "--overwrite"), runs_until_failure=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_last_checkpoint_leads_to_the_one_before(interrupted: Path, damage: str) -> None:
    harm(interrupted / "checkpoints" / "step-00000002.pt", damage)
    outcome = pst("train", "--resume", "--output", interrupted)
    assert outcome.code == 0, outcome.err
    assert "step-00000002.pt is damaged" in outcome.err
    assert "at step 1 of 4" in outcome.err


def test_finished_run_of_another_configuration(
    refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    again = ("train", "--model", tiny_bert, "--data", reviews_file, *TRAIN, "--output", "run")
    done(*again)
    refused(*again, "--seed", "1", "--resume", says=("another configuration", "seed was 0, now 1"))


# -- artifacts -----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def harm(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    new = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"not this", "flipped": content}
    path.write_bytes(new[damage])


def every_reader(artifact: str, data: Path) -> Iterator[tuple[str | Path, ...]]:
    yield "eval", artifact, "--data", data
    yield "bench", artifact, "--shapes", "1x8", "--output", "report"
    yield "inspect", artifact
    yield "serve", artifact, "--port", "0"


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
@pytest.mark.parametrize("name", ["model.onnx", "export.json", "tokenizer.json", "config.json"])
def test_damaged_artifact(refused: Refused, artifact: Path, reviews_file: Path, name: str, damage: str) -> None:
    harm(artifact / name, damage)
    for arguments in every_reader("artifact", reviews_file):
        refused(*arguments, says=(name, "again"))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json"])
def test_artifact_that_lacks_a_file(refused: Refused, artifact: Path, reviews_file: Path, name: str) -> None:
    (artifact / name).unlink()
    for arguments in every_reader("artifact", reviews_file):
        refused(*arguments, says=(name, "again"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_damaged_onnx_file_of_another_tool(refused: Refused, artifact: Path, reviews_file: Path, damage: str) -> None:
    (artifact / "export.json").unlink()
    harm(artifact / "model.onnx", damage)
    for arguments in every_reader("artifact", reviews_file):
        refused(*arguments, says="model.onnx")
    refused("inspect", "artifact/model.onnx", says="model.onnx")
    refused("bench", "artifact/model.onnx", "--shapes", "1x8", "--output", "report", says="model.onnx")


@pytest.mark.parametrize("is_ours", [True, False])
def test_missing_external_data(
    refused: Refused, external: Path, reviews_file: Path, tmp_path: Path, is_ours: bool
) -> None:
    shutil.copytree(external, tmp_path / "artifact")
    (tmp_path / "artifact" / "model.onnx.data").unlink()
    if not is_ours:
        (tmp_path / "artifact" / "export.json").unlink()
    for arguments in every_reader("artifact", reviews_file):
        refused(*arguments, says=("model.onnx", "again"))
    refused("inspect", "artifact/model.onnx", says="model.onnx.data")
    refused("bench", "artifact/model.onnx", "--shapes", "1x8", "--output", "report", says="model.onnx.data")


@pytest.mark.parametrize("is_ours", [True, False])
def test_truncated_external_data(
    refused: Refused, external: Path, reviews_file: Path, tmp_path: Path, is_ours: bool
) -> None:
    shutil.copytree(external, tmp_path / "artifact")
    truncate(tmp_path / "artifact" / "model.onnx.data")
    if not is_ours:
        (tmp_path / "artifact" / "export.json").unlink()
    for arguments in every_reader("artifact", reviews_file):
        refused(*arguments, says=("model.onnx", "again"))


def test_artifact_of_a_newer_version(refused: Refused, artifact: Path, reviews_file: Path) -> None:
    manifest = json.loads((artifact / "export.json").read_text(encoding="utf-8"))
    (artifact / "export.json").write_text(json.dumps(manifest | {"schema_version": 2}), encoding="utf-8")
    for arguments in every_reader("artifact", reviews_file):
        refused(*arguments, says=("schema version 2", "update it"))


def test_file_where_a_folder_is_wanted(refused: Refused, artifact: Path, reviews_file: Path) -> None:
    refused("eval", "artifact/model.onnx", "--data", reviews_file, says=("is a file", "folder that holds it"))
    refused("serve", "artifact/model.onnx", "--port", "0", says=("is a file", "folder that holds it"))
    refused("inspect", "artifact/config.json", says=(".safetensors", ".onnx"))


# -- the machine ---------------------------------------------------------------------------------------------------


def test_port_in_use(refused: Refused, exported: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        refused("serve", exported, "--port", port, says=(f"Port {port}", "in use", "--port"))


def test_host_that_is_not_ours(refused: Refused, exported: Path) -> None:
    refused("serve", exported, "--host", "192.0.2.1", "--port", "0", says="--host 127.0.0.1")


@pytest.mark.parametrize("place", ["save_onnx", "_save_tokenizer", "shutil.copyfile"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_space_for_an_export(refused: Refused, model: Path, artifact: Path, place: str, overwrite: bool) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    output = ("artifact", "--overwrite") if overwrite else ("new",)
    with mock.patch(f"export.pipeline.{place}", side_effect=full):
        says = ("No space is left", output[0], "free some")
        refused("export", model, "--output", *output, says=says, runs_until_failure=True)


def test_no_space_for_a_report(refused: Refused, exported: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("serve.bench.report.Report.write", side_effect=full):
        arguments = ("bench", exported, "--shapes", "1x8", "--runs", "2", "--output", "report")
        refused(*arguments, says=("No space is left", "free some"))


def test_no_space_for_a_checkpoint_keeps_the_last_ones(refused: Refused, interrupted: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    before = snapshot(interrupted / "checkpoints")
    with mock.patch("torch.save", side_effect=full):
        outcome = pst("train", "--resume", "--output", "run", "--set", "checkpoint_every=1")
    assert outcome.code == 2
    assert "No space is left" in outcome.err.splitlines()[-1]
    assert snapshot(interrupted / "checkpoints") == before
    assert pst("train", "--resume", "--output", "run").code == 0


# -- as processes of their own -------------------------------------------------------------------------------------


def says_one_error(code: int, out: str, err: str) -> str:
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert err.count("Error: ") == 1
    return err.splitlines()[-1]


def test_process_with_a_missing_file(tiny_bert: Path, tmp_path: Path) -> None:
    outcome = pst_process(*train(tiny_bert, "nowhere.jsonl"), cwd=tmp_path)
    assert "nowhere.jsonl does not exist" in says_one_error(outcome.code, outcome.out, outcome.err)
    assert list(tmp_path.iterdir()) == []


def test_process_with_a_truncated_artifact(artifact: Path, reviews_file: Path, tmp_path: Path) -> None:
    (artifact / "export.json").unlink()
    truncate(artifact / "model.onnx")
    outcome = pst_process("eval", artifact, "--data", reviews_file)
    assert outcome.err.splitlines() == [says_one_error(outcome.code, outcome.out, outcome.err)]


def test_process_with_an_unknown_option() -> None:
    outcome = pst_process("inspect", "--jsn")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "--jsn" in outcome.err


def test_process_on_a_disk_that_takes_no_more(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """A real refusal: the operating system lets no file grow beyond 32 KiB, which the weights do."""
    limited = ("bash", "-c", 'ulimit -f 32 && exec "$@"', "bash")
    arguments = (*train(tiny_bert, reviews_file), "--set", "device=cpu")
    outcome = pst_process(*arguments, cwd=tmp_path, prefix=limited)
    message = says_one_error(outcome.code, outcome.out, outcome.err)
    assert "new" in message
    assert "another folder" in message
    assert not (tmp_path / "new" / "model").exists()
    assert not [path for path in tmp_path.rglob("*") if ".partial-" in path.name]
