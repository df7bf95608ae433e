"""--resume: the same final weights, what it refuses, and what happens when files or the disk fail."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pst.train
from pst import checkpoint
from pst.batches import training_rows
from pst.errors import DataError, RunError, StorageError
from pst.run_folder import prepare_folder
from pst.schedule import CubicSchedule
from pst.train import InterruptedRun, train
from tests.conftest import write_reviews
from tests.pst.training import checkpoint_steps, leftovers, log_lines, options, report, weights

Interrupt = Callable[..., None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """``interrupt(config, output, at=5)``: train until a SIGINT in the step before 5 done steps."""

    def run(config: Any, output: Path, *, at: int, resume: bool = False) -> None:
        def signalled(*args: Any, first_step: int, **named: Any) -> Iterator[Any]:
            chosen = training_rows(*args, first_step=first_step, **named)
            for step, rows in enumerate(chosen, first_step):
                if step == at - 1:
                    signal.raise_signal(signal.SIGINT)
                yield rows

        with monkeypatch.context() as patch:
            patch.setattr(pst.train, "training_rows", signalled)
            with pytest.raises(InterruptedRun, match=rf"Stopped at step {at} of "):
                train(config, output, resume=resume)

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "dense"},
        {"method": "magnitude", "mask_every": 3},
        {"faithful": True},
        {"pattern": "2:4"},
        {"pattern": "structured", "sparsity": 0.5},
    ],
    ids=["pst", "dense", "magnitude", "faithful", "2:4", "structured"],
)
@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_every_step_is_a_place_to_stop(
    base: str,
    changes: dict[str, Any],
    interrupt: Interrupt,
    request: pytest.FixtureRequest,
    reviews_file: Path,
    tmp_path: Path,
) -> None:
    model = request.getfixturevalue(base)
    config = options(model, reviews_file, **changes, eval_every=4)
    train(config, tmp_path / "whole")
    output = tmp_path / "stopped"
    for done in (1, 5, 8, 12):  # after 12 of 12 only the result is left to do
        interrupt(config, output, at=done, resume=done > 1)
        assert checkpoint_steps(output)[-1] == done
    train(config, output, resume=True)
    assert weights(output) == weights(tmp_path / "whole")
    assert log_lines(output) == log_lines(tmp_path / "whole")
    assert report(output)["metrics"] == report(tmp_path / "whole")["metrics"]
    assert not (output / "checkpoints").exists()


def test_the_start_teaches_after_an_interruption_as_before(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    dense = train(options(tiny_bert, reviews_file, method="dense", steps=60, lr=1e-2), tmp_path / "dense").model
    config = options(dense, reviews_file, pattern="2:4")
    train(config, tmp_path / "whole")
    interrupt(config, tmp_path / "stopped", at=7)
    train(config, tmp_path / "stopped", resume=True)
    assert report(tmp_path / "whole")["teacher"] == report(tmp_path / "stopped")["teacher"] == "start"
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_a_checkpoint_holds_masks_and_sparsity(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    config = options(tiny_bert, reviews_file, sparsity=0.8, calibration=0)
    interrupt(config, tmp_path / "out", at=6)
    state = checkpoint.load_last(tmp_path / "out" / "checkpoints")
    assert state is not None
    asked = CubicSchedule(initial=0.5, final=0.8, steps=12, warmup=0.0, cooldown=0.5)(5)
    sparsities = [value for name, value in state["model"].items() if name.endswith(".sparsity")]
    assert [value.item() for value in sparsities] == [asked] * 12
    mask = state["model"]["bert.encoder.layer.0.intermediate.dense.parametrizations.weight.0.mask"]
    assert (~mask).sum().item() == int(mask.numel() * asked)


def test_one_line_says_where_it_goes_on(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(tiny_bert, reviews_file)
    interrupt(config, tmp_path / "out", at=5)
    train(config, tmp_path / "out", resume=True)
    assert f"Resuming {tmp_path / 'out'} at step 5 of 12." in capsys.readouterr().err
    train(config, tmp_path / "new", resume=True)
    assert f"No checkpoint in {tmp_path / 'new'}; starting from the first step." in capsys.readouterr().err


def test_signal_handlers_are_given_back(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt(options(tiny_bert, reviews_file), tmp_path / "out", at=2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# -- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sparsity": 0.6}, r"sparsity was 0\.5, now 0\.6"),
        ({"seed": 1}, r"seed was 0, now 1"),
        ({"pattern": "2:4"}, r"pattern was 'unstructured', now '2:4'"),
        ({"method": "dense"}, r"method was 'pst', now 'dense'"),
        ({"steps": 13, "lr": 1e-3}, r"steps was 12, now 13, lr was 0\.0001, now 0\.001"),
        ({"max_length": 20}, r"max_length was 64, now 20"),
    ],
)
def test_another_configuration(
    changes: dict[str, Any], named: str, interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    interrupt(options(tiny_bert, reviews_file), output, at=5)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=rf"another configuration \({named}.*\); repeat the options"):
        train(options(tiny_bert, reviews_file, **changes), output, resume=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_how_often_to_save_may_change(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    train(options(tiny_bert, reviews_file), tmp_path / "whole")
    interrupt(options(tiny_bert, reviews_file), tmp_path / "out", at=5)
    train(options(tiny_bert, reviews_file, checkpoint_every=2, device="auto"), tmp_path / "out", resume=True)
    if not torch.cuda.is_available():
        assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_changed_rows(interrupt: Interrupt, tiny_bert: Path, tmp_path: Path) -> None:
    reviews = write_reviews(tmp_path / "reviews.jsonl", rows=64, seed=1)
    config = options(tiny_bert, reviews)
    interrupt(config, tmp_path / "out", at=5)
    reviews.write_text(reviews.read_text().replace("superb", "lovely"))
    with pytest.raises(RunError, match=r"another configuration \(training rows was [0-9a-f]{8}\.\.\., now"):
        train(config, tmp_path / "out", resume=True)
    reviews.unlink()
    with pytest.raises(DataError, match="does not exist"):
        train(config, tmp_path / "out", resume=True)


def test_a_base_model_that_was_replaced(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    train(options(tiny_bert, reviews_file, method="dense", steps=1), base)
    config = options(base / "model", reviews_file)
    interrupt(config, tmp_path / "out", at=5)
    train(options(tiny_bert, reviews_file, method="dense", steps=2), base, overwrite=True)
    with pytest.raises(RunError, match="starting weights was"):
        train(config, tmp_path / "out", resume=True)


def test_a_finished_run_returns_its_result(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(tiny_bert, reviews_file)
    first = train(config, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(pst.tasks, "prepare", None)  # a second training would need it
    again = train(options(tiny_bert, reviews_file, checkpoint_every=7), tmp_path / "out", resume=True)
    assert (again.model, again.metrics, again.steps) == (first.model, first.metrics, first.steps)
    assert again.seconds == pytest.approx(first.seconds, abs=1e-3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(RunError, match=r"another configuration \(steps was 12, now 13\)"):
        train(options(tiny_bert, reviews_file, steps=13), tmp_path / "out", resume=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}'])
def test_a_finished_run_with_a_damaged_report(
    content: str, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    config = options(tiny_bert, reviews_file)
    train(config, tmp_path / "out")
    (tmp_path / "out" / "model" / "sparsity.json").write_text(content)
    with pytest.raises(RunError, match=r"sparsity\.json .* start again with --overwrite"):
        train(config, tmp_path / "out", resume=True)
    train(config, tmp_path / "out", overwrite=True)


def test_a_result_that_was_half_removed_is_not_finished(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """What a kill leaves when it comes while --overwrite clears the old result."""
    train(options(tiny_bert, reviews_file, seed=1), tmp_path / "whole")
    train(options(tiny_bert, reviews_file), tmp_path / "out")
    (tmp_path / "out" / "model" / "sparsity.json").unlink()
    train(options(tiny_bert, reviews_file, seed=1), tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_an_interrupted_run_is_kept_unless_told_otherwise(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    interrupt(options(tiny_bert, reviews_file), output, at=5)
    with pytest.raises(RunError, match=r"not finished, which is kept; continue it with --resume"):
        train(options(tiny_bert, reviews_file, seed=1), output)
    assert checkpoint_steps(output) == [5]
    train(options(tiny_bert, reviews_file, seed=1), output, overwrite=True)
    train(options(tiny_bert, reviews_file, seed=1), tmp_path / "whole")
    assert weights(output) == weights(tmp_path / "whole")


def test_a_folder_that_is_no_run_is_left_alone(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    mine = tmp_path / "model" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RunError, match="already holds"):
        train(options(tiny_bert, reviews_file), tmp_path, resume=True)
    assert mine.read_text() == "mine"


# -- files and disks that fail -------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "empty":
        raw.clear()
    elif how == "truncated":
        del raw[len(raw) // 2 :]
    elif how == "one bit":
        raw[len(raw) // 2] ^= 1
    else:
        raw[:] = b"this is no checkpoint"
    path.write_bytes(raw)


@pytest.mark.parametrize("how", ["empty", "truncated", "one bit", "other"])
def test_a_damaged_checkpoint_is_passed_over(
    how: str,
    interrupt: Interrupt,
    tiny_bert: Path,
    reviews_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, output = options(tiny_bert, reviews_file, checkpoint_every=4), tmp_path / "out"
    train(config, tmp_path / "whole")
    interrupt(config, output, at=7)
    assert checkpoint_steps(output) == [4, 7]
    damage(output / "checkpoints" / "step-00000007.pt", how)
    interrupt(config, output, at=6, resume=True)
    assert "step-00000007.pt is damaged" in capsys.readouterr().err
    assert checkpoint_steps(output) == [4, 6], "the damaged one must not push out a good one"
    train(config, output, resume=True)
    assert weights(output) == weights(tmp_path / "whole")
    assert log_lines(output) == log_lines(tmp_path / "whole")


def test_all_checkpoints_damaged(interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    config, output = options(tiny_bert, reviews_file, checkpoint_every=4), tmp_path / "out"
    interrupt(config, output, at=7)
    for path in output.glob("checkpoints/*"):
        damage(path, "truncated")
    with pytest.raises(RunError, match=r"No checkpoint in .* can be read; start the run again with --overwrite"):
        train(config, output, resume=True)
    assert checkpoint_steps(output) == [4, 7]
    train(config, output, overwrite=True)
    assert (output / "model").is_dir()


def test_a_log_line_cut_short_by_a_kill(
    interrupt: Interrupt, tiny_bert: Path, reviews_file: Path, tmp_path: Path
) -> None:
    config, output = options(tiny_bert, reviews_file, eval_every=2), tmp_path / "out"
    train(config, tmp_path / "whole")
    interrupt(config, output, at=7)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "eval": {"accuracy": 1.0}}\n{"step": 10, "eval": {"accuracy": 1.0}')
    train(config, output, resume=True)
    assert log_lines(output) == log_lines(tmp_path / "whole")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_while_a_checkpoint_is_saved(
    call: str, tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, output = options(tiny_bert, reviews_file, checkpoint_every=4), tmp_path / "out"
    train(config, tmp_path / "whole")
    real, saved = checkpoint.save, []

    def save(folder: Path, *, step: int, content: Any) -> Path:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        saved.append(step)
        with monkeypatch.context() as patch:
            if step == 8:
                patch.setattr(os, call, full)
            return real(folder, step=step, content=content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        with pytest.raises(StorageError, match=r"No space is left .*step-00000008\.pt; free some, or choose another"):
            train(config, output)
    assert saved == [*checkpoint_steps(output), 8] == [4, 8]
    assert leftovers(output) == []
    train(config, output, resume=True)
    assert weights(output) == weights(tmp_path / "whole")


LIMITED = """
import json, resource, signal, sys
from pathlib import Path
from pst.config import TrainConfig
from pst.errors import PSTError
from pst.train import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for options, output, limit in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        train(TrainConfig(**options), Path(output))
    except PSTError as error:
        print(type(error).__name__, error)
"""


def test_a_file_that_cannot_grow(tiny_bert: Path, reviews_file: Path, tmp_path: Path) -> None:
    """The system's own refusal (a limit on file sizes): torch and safetensors each report it in their way."""
    chosen = {"model": str(tiny_bert), "data": str(reviews_file), "device": "cpu", "sparsity": 0.5, "steps": 4}
    outputs = [tmp_path / "checkpoint", tmp_path / "model"]
    runs = [
        (chosen | {"checkpoint_every": 2}, str(outputs[0]), 100_000),  # a checkpoint is larger
        (chosen | {"checkpoint_every": 0}, str(outputs[1]), 80_000),  # the model is larger
    ]
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(runs)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    messages = ended.stdout.splitlines()
    assert len(messages) == 2, ended
    targets = [outputs[0] / "checkpoints" / "step-00000002.pt", outputs[1] / "model"]
    for message, target, output in zip(messages, targets, outputs, strict=True):
        assert message == f"StorageError {target} cannot be written: File too large. Choose another folder."
        assert leftovers(output) == []
        assert not (output / "model").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_a_line_is_logged(
    tiny_bert: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = prepare_folder

    def fill(output: Path, *args: Any, **named: Any) -> None:
        prepare(output, *args, **named)
        (output / "metrics.jsonl").unlink()
        (output / "metrics.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(pst.train, "prepare_folder", fill)
    with pytest.raises(StorageError, match="No space is left"):
        train(options(tiny_bert, reviews_file, checkpoint_every=8), tmp_path / "out")
    assert checkpoint_steps(tmp_path / "out") == [8]
