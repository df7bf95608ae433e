"""Models, output folders and checkpoints that are not what they should be."""

import os
import shutil
from pathlib import Path

import pytest

from ..command_line import done, pst, snapshot
from .conftest import TRAIN, Refused, harm, train, truncate

# -- folders that are not what they should be --------------------------------------------------------------------------


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


def test_model_that_is_a_file_or_a_run(
    refused: Refused, interrupted: Path, model: Path, reviews_file: Path, tmp_path: Path
) -> None:
    refused(*train(reviews_file, reviews_file), says=("reviews.jsonl is a file", "Hugging Face folder"))
    shutil.copytree(model, tmp_path / "run" / "model")
    refused(*train(Path("run"), reviews_file), says="run is the folder of a run; the model is run/model")


def test_model_with_a_weight_that_is_no_number(
    refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_bert, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 2] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    says = ("bert.encoder.layer.1.output.dense.weight of model holds NaN", "another model")
    refused(*train(Path("model"), reviews_file), says=says)
    refused(*train(tiny_bert, reviews_file, "--teacher", "model"), says=says)


def test_resume_where_there_is_no_run(refused: Refused) -> None:
    refused("train", "--resume", "--output", "nowhere", says="nowhere holds no run to go on with")


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


# -- output folders ----------------------------------------------------------------------------------------------------


def test_output_that_holds_a_run(refused: Refused, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    again = ("train", "--model", tiny_bert, "--data", reviews_file, *TRAIN, "--output", "run")
    done(*again)
    before = snapshot(tmp_path / "run")
    refused(*again, says=("run already holds a result, which is kept", "--overwrite"))
    done(*again, "--seed", "1", "--overwrite")
    after = snapshot(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["model/model.safetensors"] != before["model/model.safetensors"]


@pytest.mark.parametrize("option", ["--model", "--teacher"])
def test_output_that_holds_what_the_run_begins_from(
    refused: Refused, tiny_bert: Path, reviews_file: Path, option: str
) -> None:
    done("train", "--model", tiny_bert, "--data", reviews_file, *TRAIN, "--method", "dense", "--output", "new")
    says = (f"{option[2:]} new/model lies in new", "choose another --output")
    refused(*train(tiny_bert, reviews_file, option, "new/model", "--overwrite"), says=says)


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
    refused(*arguments, says=("a part of that path is a file", "another folder"))
    refused("bench", exported, "--shapes", "1x8", "--output", "file/report", says="a part of that path is a file")
    refused(
        "eval",
        exported,
        "--data",
        reviews_file,
        "--predictions",
        "file/rows.jsonl",
        says="a part of that path is a file",
    )


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


def test_overwriting_what_is_read(
    refused: Refused, model: Path, exported: Path, reviews_file: Path, tmp_path: Path
) -> None:
    run, report = tmp_path / "run", tmp_path / "report"
    shutil.copytree(model, run / "model")
    artifact = Path(shutil.copytree(exported, report / "artifact"))
    data = Path(shutil.copy(reviews_file, tmp_path / "rows.jsonl"))
    says = ("would be replaced, and with it", "another --output")
    for source, output in ((run, run), (run / "model", run), (run / "model", run / "model"), (artifact, artifact)):
        refused("export", source, "--output", output, "--overwrite", says=says)
    refused("export", run, "--format", "triton", "--output", "run", "--overwrite", says=says)
    refused("prune", run, "--output", run, "--pattern", "2:4", "--overwrite", says=says)
    for more in ((), ("--tune",)):
        refused("bench", artifact, exported, "--output", report, "--overwrite", "--shapes", "1x8", *more, says=says)
    refused("export", exported, "--output", ".", "--overwrite", says=says)
    refused("eval", artifact, "--data", data, "--predictions", "rows.jsonl", says=("replace the data", "another file"))


def test_overwriting_more_than_a_result(refused: Refused, model: Path, exported: Path, tmp_path: Path) -> None:
    says = ("holds other things than one result", "another --output")
    shutil.copytree(exported, tmp_path / "artifacts" / "one")
    refused("export", exported, "--output", "artifacts", "--overwrite", says=says)
    shutil.copy(exported / "export.json", tmp_path / "artifacts")  # not a result alone either
    refused("bench", exported, "--shapes", "1x8", "--output", "artifacts", "--overwrite", says=says)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine", encoding="utf-8")
    refused("prune", model, "--output", "own", "--pattern", "2:4", "--overwrite", says=says)


def test_a_mount_point_is_refused_before_any_work(
    refused: Refused, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "volume")
    (tmp_path / "volume").mkdir()
    says = ("is a mount point", "volume/result")
    refused("export", exported, "--output", "volume", says=says)
    refused("bench", exported, "--shapes", "1x8", "--output", "volume", says=says)


def test_failed_export_keeps_the_artifact_that_was_there(refused: Refused, model: Path, artifact: Path) -> None:
    arguments = ("export", model, "--output", "artifact", "--overwrite", "--atol", "0", "--rtol", "0")
    refused(*arguments, says="--atol", runs_until_failure=True)


# -- checkpoints -------------------------------------------------------------------------------------------------------


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
