"""Data that cannot be used."""

import shutil
from pathlib import Path

from .conftest import Refused, rows, train


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
