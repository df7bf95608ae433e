"""Artifacts and options between which pst bench --tune cannot choose."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Refused


@pytest.fixture(scope="session")
def dense(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT's artifact. Read only."""
    from export.pipeline import export

    output = tmp_path_factory.mktemp("dense") / "dense"
    export(tiny_bert, output)
    return output


def tuning(*arguments: str | Path) -> tuple[str | Path, ...]:
    return ("bench", *arguments, "--tune", "--shapes", "1x8", "--output", "tuned")


def test_no_dense_parent(refused: Refused, exported: Path, model: Path) -> None:
    refused(*tuning(exported, model), says=("is dense", "give the artifact of the dense parent"))


def test_another_model(refused: Refused, dense: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(dense, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    manifest = json.loads((other / "export.json").read_text(encoding="utf-8"))
    manifest["files"].pop("config.json", None)
    (other / "export.json").write_text(json.dumps(manifest), encoding="utf-8")
    refused(*tuning(dense, other), says=("not of one model", "layers is 2 and 3"))


def test_a_file_that_says_nothing(refused: Refused, dense: Path) -> None:
    refused(*tuning(dense, dense / "model.onnx"), says=("does not say whether it is dense", "pst export"))


def test_the_same_artifact_twice(refused: Refused, dense: Path) -> None:
    refused(*tuning(dense, dense), says="given twice")


def test_no_artifact(refused: Refused, dense: Path) -> None:
    refused(*tuning(dense, "nowhere"), says="nowhere does not exist")


def test_engines(refused: Refused, dense: Path, exported: Path) -> None:
    refused(*tuning(dense, exported, "--engine", "onnxruntime,abacus"), says=("abacus is not an engine", "tensorrt"))
    refused(
        *tuning(dense, exported, "--engine", "onnxruntime,torch"), says=("torch reads model folders", "leave it out")
    )
    refused(*tuning(dense, exported, "--engine", "auto,torch"), says="auto by itself")
    refused(*tuning(dense, exported, "--engine", ","), says="auto by itself")


def test_two_engines_without_tune(refused: Refused, dense: Path) -> None:
    arguments = ("bench", dense, "--engine", "onnxruntime,torch", "--shapes", "1x8", "--output", "new")
    refused(*arguments, says="is not an engine")


def test_options_that_do_not_go_together(refused: Refused, dense: Path, exported: Path, reviews_file: Path) -> None:
    refused(*tuning(dense, exported, "--data", reviews_file), says=("leave --data out", "pst eval"))
    refused("bench", dense, "--traffic", "t.csv", "--output", "new", says=("add --tune", "--shapes"))
    refused(*tuning(dense, exported, "--traffic", "none.csv"), says="cannot be read as text")
    refused(*tuning(dense, exported, "--precision", "2"), says="--precision from 0")


def test_output_that_is_in_the_way(refused: Refused, dense: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "mine").write_text("mine", encoding="utf-8")
    refused(*tuning(dense, exported), says="--overwrite")


def test_a_shape_that_is_too_long(refused: Refused, dense: Path, exported: Path) -> None:
    arguments = ("bench", dense, exported, "--tune", "--shapes", "1x65", "--output", "tuned")
    refused(*arguments, says="is longer than", runs_until_failure=True)


@pytest.mark.parametrize("damage", ["{", "[]", '{"schema_version": 2}'])
def test_serving_what_is_no_tuning(refused: Refused, tmp_path: Path, damage: str) -> None:
    (tmp_path / "tuned.json").write_text(damage, encoding="utf-8")
    refused("serve", "tuned.json", says="pst bench --tune wrote")


def test_a_missing_engine_alone(refused: Refused, dense: Path, exported: Path) -> None:
    pytest.importorskip("onnxruntime")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        refused(
            *tuning(dense, exported, "--engine", "tensorrt"),
            says=("No dense artifact opens", "install"),
            runs_until_failure=True,
        )
    else:
        pytest.skip("TensorRT is installed")


def test_a_model_of_another_pattern_is_no_dense_one(refused: Refused, sparse_model: Callable[..., Path]) -> None:
    refused(*tuning(sparse_model("2:4"), sparse_model("unstructured", 0.5)), says="is dense")
