"""The terminal: exit codes, what goes to stdout and what to stderr, interruption, readers that leave."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import yaml

from pst import __version__
from pst.config import TrainConfig
from pst.settings import describe

from .command_line import command, done, environment, pst, pst_process

TRAIN = ("--sparsity", "0.5", "--steps", "4", "--set", "batch_size=8", "--set", "r1=2", "--set", "r2=2")


@pytest.fixture(scope="module")
def model(sparse_model: Callable[..., Path]) -> Path:
    """A 2:4 model folder."""
    return sparse_model("2:4")


def shell(script: str, cwd: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """*script* in bash, where ``pst`` is the function that runs this project's command."""
    function = f'pst() {{ "{sys.executable}" -m cli "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", function + script], cwd=cwd, env=environment(**more), capture_output=True, text=True, check=False
    )


# -- exit codes ----------------------------------------------------------------------------------------------------


def test_version() -> None:
    assert done("--version") == f"{__version__}\n"


def test_without_arguments_the_commands_are_listed() -> None:
    outcome = pst()
    assert outcome.code == 2
    assert "quickstart" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sing",), "No such command 'sing'"),
        (("train",), "Missing option '--output'"),
        (("inspect",), "Missing argument"),
        (("inspect", "model", "--loudly"), "No such option"),
        (("eval", "model", "--data", "rows.csv", "--batch-size", "0"), "--batch-size"),
        (("serve", "model", "--port", "65536"), "--port"),
        (("bench", "model", "--output", "report", "--warmup", "0"), "--warmup"),
        (("train", "--output", "run", "--steps", "many"), "--steps"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], says: str) -> None:
    outcome = pst(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert says in outcome.err
    assert "Usage: pst" in outcome.err
    assert "Traceback" not in outcome.err


def test_an_error_of_ours_is_not_hidden() -> None:
    """Exit code 2 is for what the user can mend; a defect of the program keeps its traceback."""
    with mock.patch("export.inspect.inspect", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        pst("inspect", "model")


# -- stdout and stderr ---------------------------------------------------------------------------------------------


def test_json_can_be_piped(model: Path, reviews_file: Path, tmp_path: Path) -> None:
    script = f"set -o pipefail; pst inspect --json {model} | python -m json.tool > inspect.json && "
    script += f"pst eval --json {model} --data {reviews_file} | python -m json.tool > eval.json"
    ran = shell(script, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "inspect.json").read_text(encoding="utf-8"))["model_type"] == "bert"
    assert json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["rows"] == 64


def test_each_command_prints_its_result_alone_to_stdout(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    run, artifact = tmp_path / "run", tmp_path / "artifact"
    trained = done("train", "--model", tiny_bert, "--data", reviews_file, "--output", run, *TRAIN)
    assert trained.startswith(f"{run / 'model'}: accuracy ")
    assert trained.endswith(" s)\n")
    assert trained.count("\n") == 1
    exported = pst("export", run, "--output", artifact)
    assert exported.out == f"{artifact}: unstructured, 50.0% zeros, opset 17\n"
    assert "Outputs agree with PyTorch" in exported.err
    options = ("--shapes", "1x8", "--runs", "2", "--engine", "onnxruntime", "--output", tmp_path / "report")
    benched = pst("bench", artifact, *options)
    assert "p50" in benched.out
    assert benched.err == ""


def test_the_report_tells_the_command(model: Path, tmp_path: Path) -> None:
    arguments = ("bench", str(model), "--shapes", "1x8", "--runs", "2", "--output", str(tmp_path / "my report"))
    done(*arguments)
    assert f"pst bench {model} --shapes 1x8" in (tmp_path / "my report" / "report.md").read_text(encoding="utf-8")
    assert "'" in json.loads((tmp_path / "my report" / "report.json").read_text())["environment"]["command"]


@pytest.mark.parametrize(
    "arguments", ["inspect --json {model}", "train --list-options", "inspect {model}", "--version"]
)
@pytest.mark.parametrize("reader", ["true", "head -c 1"])
def test_a_reader_that_leaves_is_no_error(model: Path, tmp_path: Path, arguments: str, reader: str) -> None:
    ran = shell(f"(sleep 0.1; pst {arguments.format(model=model)}; echo $? >&2) | {reader}", tmp_path)
    assert ran.stderr == "0\n"


def test_a_full_disk_behind_stdout_is_an_error(model: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    ran = shell(f"pst inspect {model} > /dev/full", tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("Error: The output cannot be written")


def test_a_terminal_that_is_not_unicode(model: Path, reviews_file: Path, tmp_path: Path) -> None:
    ran = shell(f"pst eval {model} --data {reviews_file}", tmp_path, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    assert "accuracy" in ran.stdout


def test_json_is_whole_on_a_terminal_that_is_not_unicode(model: Path, tmp_path: Path) -> None:
    (tmp_path / "Modèle").symlink_to(model)
    ran = shell("pst inspect --json Modèle", tmp_path, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["path"] == "Modèle"


# -- settings ------------------------------------------------------------------------------------------------------


def test_settings_override_in_the_order_that_help_states(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """Defaults, --config, --set, named flags: the run folder holds what came of it."""
    file, run = tmp_path / "train.yaml", tmp_path / "run"
    file.write_text(f"data: {reviews_file}\nsteps: 9\nseed: 5\nr1: 3\nr2: 3\nsparsity: 0.25\n", encoding="utf-8")
    flags = ("--seed", "7", "--steps", "2")
    done("train", "--config", file, "--model", tiny_bert, "--set", "r1=2", "--set", "seed=6", *flags, "--output", run)
    stored = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    wanted = {"steps": 2, "seed": 7, "r1": 2, "r2": 3, "sparsity": 0.25, "batch_size": 32}
    assert {key: stored[key] for key in wanted} == wanted


def test_epochs_asked_for_win_over_the_steps_of_a_file(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "train.yaml", tmp_path / "run"
    file.write_text(f"model: {tiny_bert}\ndata: {reviews_file}\nsteps: 9\nsparsity: 0.5\n", encoding="utf-8")
    said = done("train", "--config", file, "--epochs", "0.5", "--output", run)
    assert "(1 steps," in said  # half of the 57 rows that are not for validation, 32 a step
    assert "(3 steps," in done("train", "--config", file, "--epochs", "1", "--steps", "3", "--overwrite", "-o", run)


def test_every_setting_is_listed() -> None:
    lines = done("train", "--list-options").splitlines()
    assert [line.split(" ")[0] for line in lines] == [row.key for row in describe(TrainConfig)]


# -- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_continue(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    options = ("--model", tiny_bert, "--data", reviews_file, *TRAIN, "--steps", "150", "--output", run)
    process = subprocess.Popen(
        command("train", *options), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = run / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"of 150; continue with --resume --output {run}.")
    assert not (run / "model").exists()
    resumed = pst_process("train", "--resume", "--output", run)
    assert resumed.code == 0, resumed.err
    assert f"Resuming {run} at step " in resumed.err
    assert "(150 steps, " in resumed.out
    assert not (run / "checkpoints").exists()


def test_an_interrupted_export_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with mock.patch("export.pipeline.check_parity", side_effect=KeyboardInterrupt):
        outcome = pst("export", model, "--output", tmp_path / "artifact")
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []
