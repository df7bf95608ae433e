"""Atomic files and folders: the old content or the new, never half of one, and errors that say what to do."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pst import files
from pst.errors import DataError, RunError, StorageError
from pst.files import (
    atomic_file,
    atomic_folder,
    read_json,
    refuse_existing,
    remove,
    resolve_model,
    sha256,
    storage_errors,
    write_json,
)
from tests.pst.training import leftovers

as_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")


def refusing(number: int) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def write_and_raise(partial: Path, error: type[BaseException] | None) -> None:
    partial.write_text("half")
    if error is not None:
        raise error


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a [b]*.txt"
    with atomic_file(target) as partial:
        partial.write_text("new")
        assert partial.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_in_the_block_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    for error in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(error), atomic_file(target) as partial:
            write_and_raise(partial, error)
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO])
def test_a_refusal_of_the_disk_keeps_the_old_content(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    full = number in (errno.ENOSPC, errno.EDQUOT)
    expected = "No space is left on the disk that holds .*; free some" if full else "cannot be written: .* Choose"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refusing(number))
        with pytest.raises(StorageError, match=expected), atomic_file(target) as partial:
            partial.write_text("new")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_target_that_cannot_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(StorageError, match="folder cannot be written: "), atomic_file(tmp_path / "folder") as partial:
        partial.write_text("new")
    (tmp_path / "file").write_text("old")
    with pytest.raises(StorageError, match="a part of that path is a file"), atomic_file(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")
    assert leftovers(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_a_device_or_a_pipe_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for target in (pipe, tmp_path / "link"):
        with pytest.raises(StorageError, match="is a device or a pipe"), atomic_file(target):
            pytest.fail("the block must not run")
        with pytest.raises(RunError, match="wants a folder"), atomic_folder(target, overwrite=True):
            pytest.fail("the block must not run")
    assert pipe.is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("before", ["nothing", "old"])
def test_links_are_followed(before: str, tmp_path: Path) -> None:
    """A result lands on the disk that its link leads to."""
    disk, here = tmp_path / "disk", tmp_path / "here"
    (disk / "folder").mkdir(parents=True)
    here.mkdir()
    if before == "old":
        (disk / "file").write_text("old")
        (disk / "folder" / "old").write_text("old")
    for name in ("file", "folder"):
        (here / name).symlink_to(Path("..") / "disk" / name)
    with atomic_file(here / "file") as partial:
        partial.write_text("new")
    with atomic_folder(here / "folder", overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert (here / "file").is_symlink()
    assert (here / "folder").is_symlink()
    assert content(disk) == {"file": "new", "folder/new": "new"}
    assert leftovers(tmp_path) == []


@as_user
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    for make in (atomic_file, atomic_folder):
        with pytest.raises(StorageError, match="Permission denied"), make(tmp_path / "locked" / "new") as partial:
            partial.write_text("new")


def test_other_errors_of_the_system_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path):
        (tmp_path / "nothing").read_text()
    with pytest.raises(RunError, match="mine"), storage_errors(tmp_path):
        raise RunError("mine") from OSError(errno.ENOSPC, "")


def test_errors_of_libraries_that_hide_the_systems_own(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No space"), storage_errors(tmp_path):  # tokenizers, safetensors
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StorageError, match="No space"), storage_errors(tmp_path):  # torch.save
        fail_as_torch_does()


def fail_as_torch_does() -> None:
    try:
        refusing(errno.ENOSPC)()
    except OSError:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904


# -- folders -------------------------------------------------------------------------------------------------------


def fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_a_folder_appears_whole(before: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    if before == "empty":
        target.mkdir(parents=True)
    with atomic_folder(target) as partial:
        fill(partial, "new")
        assert not target.exists() or not any(target.iterdir())
    assert content(target) == {"a": "new", "sub/b": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_is_replaced_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RunError, match="already holds a result, which is kept"), atomic_folder(target):
        pytest.fail("the block must not run")
    with atomic_folder(target, overwrite=True) as partial:
        fill(partial, "new")
        assert content(target) == {"old": "old"}
    assert content(target) == {"a": "new", "sub/b": "new"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("call", "swap"), [("block", True), ("fsync", True), ("block", False), ("fsync", False), ("rename", False)]
)
def test_an_error_keeps_the_old_folder(call: str, swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = os.rename

    def second_fails(source: Path, to: Path) -> None:
        if source.name.startswith(".out.partial"):
            refusing(errno.ENOSPC)()
        rename(source, to)

    with monkeypatch.context() as patch:
        if not swap:
            patch.setattr(files, "_exchange", lambda a, b: False)
        if call != "block":
            patch.setattr(os, call, second_fails if call == "rename" else refusing(errno.ENOSPC))
        with pytest.raises((StorageError, ZeroDivisionError)), atomic_folder(target, overwrite=True) as partial:
            write_and_raise(partial / "new", ZeroDivisionError if call == "block" else None)
    assert content(target) == {"old": "old"}
    assert list(tmp_path.iterdir()) == [target]


def test_without_a_swap_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "out", overwrite=True) as partial:
            fill(partial, text)
    assert content(tmp_path / "out") == {"a": "new", "sub/b": "new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_a_swap_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "a", "one")
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot swap two names")
    assert (content(tmp_path / "a"), content(tmp_path / "b")["a"]) == ({}, "one")
    assert not files._exchange(tmp_path / "a", tmp_path / "nothing")
    monkeypatch.setattr(os, "rename", refusing(errno.EIO))
    with atomic_folder(tmp_path / "b", overwrite=True) as partial:
        fill(partial, "two")
    assert content(tmp_path / "b") == {"a": "two", "sub/b": "two"}


KILLED = """
import os, signal, sys
from pathlib import Path
from pst import files
place, target = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if place != "block":
    owner = files if place in ("_exchange", "remove") else os
    setattr(owner, place, die)
with files.atomic_folder(target, overwrite=True) as partial:
    (partial / "a").write_text("new")
    place == "block" and die()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
@pytest.mark.parametrize("place", ["block", "fsync", "_exchange", "remove"])
def test_a_kill_leaves_one_or_the_other_and_the_next_writer_clears_up(place: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", KILLED, place, str(target)], cwd=root, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert content(target) == {"a": "new" if place == "remove" else "old"}
    assert len(leftovers(tmp_path)) == 1
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "a").write_text("last")
    assert content(target) == {"a": "last"}
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    living = tmp_path / f".file.partial-{os.getppid()}"
    own = tmp_path / f".file.partial-{os.getpid()}"
    dead = [tmp_path / ".file.partial-999999999", tmp_path / ".file.partial-x"]
    for path in (living, *dead):
        path.write_text("half")
    own.mkdir()  # a killed process can have had the number that this one has now
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / "file"])


# -- the rest ------------------------------------------------------------------------------------------------------


def test_refuse_existing(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "nothing", overwrite=False)
    refuse_existing(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="is a file; --output wants a folder"):
            refuse_existing(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(RunError, match=r"already holds a result, which is kept; .*--overwrite"):
        refuse_existing(tmp_path, overwrite=False)
    refuse_existing(tmp_path, overwrite=True)


def test_remove_takes_anything(tmp_path: Path) -> None:
    (tmp_path / "target" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("")
    for name in ("link", "file", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["target"], "a link goes, not what it leads to"
    remove(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, 2.5, None]})
    assert "ä" in path.read_text(encoding="utf-8")
    assert read_json(path, DataError, "make it again.") == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path, DataError, "") == {"ä": [1, 2.5, None]}
    with pytest.raises(DataError, match=r"nothing\.json is missing; make it again\."):
        read_json(tmp_path / "nothing.json", DataError, "make it again.")
    for text, problem in (("{", "is not readable JSON"), ("[]", "does not hold a JSON object"), ("", "not readable")):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"{problem}.*; make it again\."):
            read_json(path, DataError, "make it again.")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not readable JSON"):
        read_json(path, DataError, "make it again.")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_resolve_model(tmp_path: Path) -> None:
    assert resolve_model(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path / "model"
    assert resolve_model(tmp_path / "model") == tmp_path / "model"
