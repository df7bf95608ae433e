"""The commands of docs/export.md run as they stand."""

import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.passes import LINEAR_FORMS

from .command_line import ROOT, done

GUIDE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


def test_commands_run_as_they_stand(
    sparse_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sparse_model("2:4", 0.5), tmp_path / "runs" / "sparse")
    monkeypatch.chdir(tmp_path)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        if "tensorrt" in command and importlib.util.find_spec("tensorrt_rtx") is None:
            continue  # tests/export/targets says so
        assert done(*shlex.split(command)[1:])
    assert (tmp_path / "repository" / "reviews" / "config.pbtxt").is_file()


def test_every_form_is_explained() -> None:
    assert re.findall(r"^\| `(\w+)` \|", GUIDE, flags=re.MULTILINE) == list(LINEAR_FORMS)
