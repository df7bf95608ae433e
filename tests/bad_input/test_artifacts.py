"""Artifacts that are damaged, incomplete, or not what they should be."""

import json
import shutil
from pathlib import Path

import pytest

from ..command_line import done
from .conftest import Refused, every_reader, harm, truncate


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


def test_model_whose_texts_have_several_labels(
    refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    """Their scores are sigmoids; a softmax of them would be wrong."""
    from transformers import BertConfig, BertForSequenceClassification

    shutil.copytree(tiny_bert, tmp_path / "model")
    config = BertConfig.from_pretrained(tiny_bert, problem_type="multi_label_classification")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    done("export", "model", "--output", "artifact", "--data", reviews_file)
    assert json.loads((tmp_path / "artifact" / "export.json").read_text(encoding="utf-8"))["accuracy"] is None
    says = ("several labels", "sigmoid")
    for path in ("model", "artifact"):
        refused("eval", path, "--data", reviews_file, says=says)
        refused("serve", path, "--port", "0", says=says)
    refused("bench", "artifact", "--data", reviews_file, "--output", "report", says=says)


def test_file_where_a_folder_is_wanted(refused: Refused, artifact: Path, reviews_file: Path) -> None:
    refused("eval", "artifact/model.onnx", "--data", reviews_file, says=("is a file", "folder that holds it"))
    refused("serve", "artifact/model.onnx", "--port", "0", says=("is a file", "folder that holds it"))
    refused("inspect", "artifact/config.json", says=(".safetensors", ".onnx"))
