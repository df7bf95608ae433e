"""Ports in use, full disks; and the same as processes of their own."""

import errno
import os
import socket
from pathlib import Path
from unittest import mock

import pytest

from ..command_line import pst, pst_process, snapshot
from .conftest import Refused, train, truncate

# -- the machine -------------------------------------------------------------------------------------------------------


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


# -- as processes of their own -----------------------------------------------------------------------------------------


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
