"""From ``pst train`` of a language model to its artifact, by the commands a person gives."""

from pathlib import Path

import pytest

from export.manifest import Manifest

from ..command_line import done
from ..pst.tasks.conftest import fact_rows, write_rows


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT2LMHeadModel whose tokenizer was learned from the rows; so each text can be written with it."""
    from pst.scratch import make_gpt2

    folder = tmp_path_factory.mktemp("tiny_lm") / "model"
    texts = [text for row in fact_rows() for text in row.values()]
    make_gpt2(folder, texts, layers=1, width=32, heads=2, positions=64, vocabulary=300, dropout=0.0)
    return folder


@pytest.mark.parametrize(("task", "pattern"), [("data_to_text", "2:4"), ("language_modeling", "unstructured")])
def test_train_and_export(task: str, pattern: str, tiny_lm: Path, tmp_path: Path) -> None:
    if task == "data_to_text":
        pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install sacrebleu")
        write_rows(tmp_path / "train.jsonl", fact_rows())
        write_rows(tmp_path / "validation.jsonl", fact_rows())
    else:
        texts = [{"text": row["human_reference"]} for row in fact_rows()]
        write_rows(tmp_path / "train.jsonl", texts)
        write_rows(tmp_path / "validation.jsonl", texts)
    options = [f"task={task}", "batch_size=4", "r1=2", "r2=2", "num_beams=2", "max_new_tokens=4", "device=cpu"]
    done(
        "train", "--model", tiny_lm, "--data", tmp_path, "--output", tmp_path / "run", "--pattern", pattern,
        "--sparsity", "0.5", "--steps", "3", *(word for option in options for word in ("--set", option)),
    )  # fmt: skip
    printed = done("export", tmp_path / "run", "--format", "onnx", "--output", tmp_path / "artifact")
    assert f"{pattern}, 50.0% zeros, opset 17" in printed
    manifest = Manifest.load(tmp_path / "artifact")
    assert (manifest.task, manifest.pattern, len(manifest.weights)) == ("text_generation", pattern, 4)
    assert {weight.axis for weight in manifest.weights} == {0}
    last = manifest.parity.cases[-1]
    assert (last["name"], last["rows"]) == ("real", 12)  # prompts with their targets, or documents

    done("export", tmp_path / "run", "--data", tmp_path, "--output", tmp_path / "artifact", "--overwrite")
    assert Manifest.load(tmp_path / "artifact").parity.cases[-1]["name"] == "real"
    assert "built-in text" in str(without_data(tmp_path).parity.cases)


def without_data(folder: Path) -> Manifest:
    """Its manifest, exported once the training data is gone."""
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").unlink()
    done("export", folder / "run", "--output", folder / "again")
    return Manifest.load(folder / "again")
