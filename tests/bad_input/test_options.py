"""Options that cannot be used."""

import shutil
from pathlib import Path

import pytest

from .conftest import Refused, train


def test_max_length_beyond_the_model(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--set", "max_length=65"), says=("max_length is 65", "at most 64"))


@pytest.mark.parametrize("length", ["-5", "0", "2"])
def test_length_without_room_for_a_word(refused: Refused, tiny_bert: Path, reviews_file: Path, length: str) -> None:
    arguments = ("prune", tiny_bert, "--sparsity", "0.5", "--data", reviews_file, "--max-length", length)
    refused(*arguments, "--output", "new", says=(f"max_length is {length}", "at least 3"))


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "nan"])
def test_sparsity_outside_its_range(refused: Refused, tiny_bert: Path, reviews_file: Path, sparsity: str) -> None:
    says = "not a number" if sparsity == "nan" else "outside [0, 1)"
    refused(*train(tiny_bert, reviews_file, "--sparsity", sparsity), says=says)


def test_sparsity_that_the_pattern_contradicts(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--pattern", "1:4"), says=("1:4 has sparsity 0.75", "leave --sparsity out"))


def test_more_than_can_be_removed(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    arguments = train(tiny_bert, reviews_file, "--pattern", "structured", "--sparsity", "0.99")
    refused(*arguments, says=("Sparsity 0.99 cannot be reached", "at most 0.", "Give a lower --sparsity."))


def test_unknown_pattern(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--pattern", "checkers"), says=("'checkers'", "2:4", "unstructured"))


def test_unknown_method(refused: Refused, tiny_bert: Path, reviews_file: Path) -> None:
    refused(*train(tiny_bert, reviews_file, "--method", "wishes"), says=("'wishes'", "dense, fixed_mask, magnitude"))


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


def test_options_that_would_have_no_effect(refused: Refused, model: Path, exported: Path, reviews_file: Path) -> None:
    again = ("export", model, "--output", "new")
    refused(*again, "--activations", "int8", says="add --precision int8")
    refused(*again, "--profile", "1x1,8x32,16x32", says="add --format tensorrt, triton")
    refused(*again, "--compute-capability", "SM86", says="add --format tensorrt")
    refused(*again, "--format", "triton", "--compute-capability", "SM86", says="add --format tensorrt")
    for option in (("--data", reviews_file), ("--external-data",), ("--atol", "1")):
        refused("export", exported, "--output", "new", *option, says=f"is an artifact, of which {option[0]} is decided")


@pytest.mark.parametrize("profile", ["1x1,8x32", "8x32,1x1,16x32", "words"])
def test_profile_that_is_none_is_refused_before_the_export(refused: Refused, model: Path, profile: str) -> None:
    refused("export", model, "--format", "triton", "--output", "new", "--profile", profile, says="1x1,8x128,32x128")


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
