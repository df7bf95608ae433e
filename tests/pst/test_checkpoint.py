"""Checkpoints: whole or not at all, the last two kept, a damaged one passed over, and no code run by loading one."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pst import checkpoint
from pst.errors import RunError
from tests.pst.training import leftovers


def save(folder: Path, step: int, **content: Any) -> Path:
    return checkpoint.save(folder, step=step, content={"value": torch.full((50,), float(step)), **content})


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_stay(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        path = save(tmp_path, step)
        assert path == tmp_path / f"step-{step:08d}.pt"
    assert kept(tmp_path) == ["step-00000015.pt", "step-00000020.pt"]
    state = checkpoint.load_last(tmp_path)
    assert state is not None
    assert state["step"] == 20
    assert torch.equal(state["value"], torch.full((50,), 20.0))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_last(tmp_path) is None
    assert checkpoint.load_last(tmp_path / "nothing") is None


def test_every_cut_and_every_flipped_byte_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At every place in the file the answer is the step before, or the content as it was: never something else."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 37):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            state = checkpoint.load_last(tmp_path)
            assert state is not None
            assert state["value"].tolist() == [float(state["step"])] * 50
            noticed += state["step"] == 1
    assert noticed > 0.5 * len(range(0, len(whole), 37)), "all cuts at least"
    assert "step-00000002.pt is damaged" in capsys.readouterr().err


def test_a_damaged_one_makes_room_for_what_follows(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20).write_bytes(b"damaged")
    save(tmp_path, 12)
    assert kept(tmp_path) == ["step-00000010.pt", "step-00000012.pt"]


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step).write_bytes(b"")
    with pytest.raises(RunError, match=r"No checkpoint in .* can be read; start the run again with --overwrite"):
        checkpoint.load_last(tmp_path)


def test_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA_VERSION", 99)
        save(tmp_path, 3)
    with pytest.raises(RunError, match=r"step-00000003\.pt was written by another version .*schema 99.*reads 2"):
        checkpoint.load_last(tmp_path)


def test_an_error_while_writing_keeps_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save(tmp_path, 2, value=lambda: None)  # cannot be pickled
    assert kept(tmp_path) == ["step-00000001.pt"]
    assert leftovers(tmp_path) == []


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD"],)


def test_loading_runs_no_code_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "run"))
    save(tmp_path, 1, value=Payload())
    with pytest.raises(RunError, match="can be read"):
        checkpoint.load_last(tmp_path)
    assert not (tmp_path / "run").exists()


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return (random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(()).item())

    np.random.randn()  # leaves the second number of a pair behind, which is a part of the state
    random.gauss()
    save(tmp_path, 1, random=checkpoint.random_state())
    expected = [draw() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    state = checkpoint.load_last(tmp_path)
    assert state is not None
    checkpoint.set_random_state(state["random"])
    assert [draw() for _ in range(3)] == expected
