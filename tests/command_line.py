"""Running ``pst`` as a user does: in this process for speed, or as a process of its own where that is the point."""

import contextlib
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import cli

ROOT = Path(cli.__file__).resolve().parent
NO_COMPILER = "Zeros are multiplied like any other number."
"""What is said before anything else on a machine where the kernels that skip them cannot be compiled."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command leaves behind on the terminal."""

    code: int
    out: str
    err: str


def pst(*arguments: str | Path) -> Outcome:
    """The entry point of ``pst`` with *arguments*, in this process."""
    if "torch" in sys.modules:  # an earlier command may have asked for more threads than tiny models can use
        sys.modules["torch"].set_num_threads(1)
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["pst", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code=code, out=out.getvalue(), err=err.getvalue())


def done(*arguments: str | Path) -> str:
    """What a command that must succeed prints to stdout."""
    outcome = pst(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def environment(**more: str) -> dict[str, str]:
    """For a process that finds this project's modules from any folder, on one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def ready_url(process: "subprocess.Popen[str]") -> str:
    """The address that ``pst serve`` announces in the first line of its stderr."""
    assert process.stderr is not None
    line = process.stderr.readline()
    if line.startswith(NO_COMPILER):
        line = process.stderr.readline()
    found = re.fullmatch(r"Serving (\S+) at (http://\S+:\d+)\n", line)
    assert found, line
    return found[2]


def command(*arguments: str | Path) -> list[str]:
    """The words that start ``pst`` as a process."""
    return [sys.executable, "-m", "cli", *map(str, arguments)]


def pst_process(*arguments: str | Path, cwd: Path | None = None, prefix: tuple[str, ...] = ()) -> Outcome:
    """``pst`` as a process of its own; *prefix* is a command that runs it, such as a shell that sets a limit."""
    ran = subprocess.run(
        [*prefix, *command(*arguments)], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    return Outcome(code=ran.returncode, out=ran.stdout, err=ran.stderr)


def interrupted_run(output: Path, *arguments: str | Path) -> None:
    """A run that SIGINT stopped when its second step had ended: *output* then holds the checkpoints of both."""
    from pst import checkpoint

    save = checkpoint.save

    def save_and_interrupt(folder: Path, *, step: int, content: Mapping[str, object]) -> Path:
        written = save(folder, step=step, content=content)
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return written

    with mock.patch.object(checkpoint, "save", save_and_interrupt):
        outcome = pst("train", *arguments, "--set", "checkpoint_every=1", "--output", output)
    assert outcome.code == 130, outcome.err
    assert len(list((output / "checkpoints").iterdir())) == 2


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below *folder*, hidden ones too, with the hash of its content, or "folder".

    But TensorBoard's files, whose names hold the time.
    """
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if "tensorboard" not in path.parts
    }
