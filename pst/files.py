"""Writing files so that a kill at any moment leaves either the old content or the new, never half of one.

Needs the standard library alone: every layer may import it.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pst.errors import ModelError, PSTError, RunError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}
_REFUSED |= {errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY}

_RESULTS = ("export.json", "config.pbtxt", "report.json", "tuned.json", "sparsity.json")
"""A folder that is written as a whole has one of them."""
_IN_RESULTS = {"plans", "1"}
"""The folders that such a one can hold: of TensorRT's plans, and of Triton's version 1."""


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says below *path* (no space, no permission, no folder) into a StorageError that names it."""
    try:
        yield
    except PSTError:
        raise
    except Exception as error:
        number = _os_errno(error)
        if number in _FULL:
            raise StorageError(
                f"No space is left on the disk that holds {path}; free some, or choose another folder with --output."
            ) from error
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise StorageError(
                f"{path} cannot be made: a part of that path is a file. Choose another folder."
            ) from error
        if number in _REFUSED:
            raise StorageError(f"{path} cannot be written: {os.strerror(number)}. Choose another folder.") from error
        raise


def _os_errno(error: BaseException | None) -> int:
    """The operating system's errno behind *error*, or 0.

    torch.save hides the OSError behind a RuntimeError; safetensors and tokenizers (Rust) write it into the message.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return 0


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _real(target: Path) -> Path:
    """Where *target* lies once links are followed, so that a link stays one; StorageError for a device or pipe."""
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise StorageError(f"{target} is a device or a pipe, which would be replaced; choose a file or a folder.")
    return Path(os.path.realpath(target))


def _partial(target: Path) -> Path:
    """Where this process writes what becomes *target*. Clears what killed processes left of the same."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not _is_alive(pid):
            remove(leftover)
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:
        return True  # another user's
    return True


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it; nothing happens to what is none, or cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_file() or path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside *target* to write to; on success it is flushed to disk and renamed to *target*.

    Of a link, *target* is what it leads to. Raises StorageError where the disk refuses; *target* is then as it was.
    """
    with storage_errors(target):
        target = _real(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        try:
            yield partial
            _sync(partial)
            os.replace(partial, target)
            _sync(target.parent)
        finally:
            remove(partial)


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside *target*; on success every file in it is flushed and it becomes *target*.

    An existing, non-empty *target* is replaced only with ``overwrite=True``, and only once the new one is whole.
    Of a link, *target* is what it leads to.
    Raises RunError where it is in the way, StorageError where the disk refuses.
    """
    refuse_existing(target, overwrite=overwrite)
    with storage_errors(target):
        target = _real(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        try:
            partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                if path.is_file() or path.is_dir():
                    _sync(path)
            if not target.exists():
                os.rename(partial, target)
            elif not _exchange(partial, target):
                _replace_folder(partial, target)
            _sync(target.parent)
        finally:
            remove(partial)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux, renameat2). False where the system or the file system cannot."""
    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)


def _replace_folder(new: Path, target: Path) -> None:
    """Two renames: a kill between them leaves the old folder as .NAME.old-PID, an error puts it back."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    remove(old)


def refuse_existing(target: Path, *, overwrite: bool, reads: Sequence[Path | str | None] | None = None) -> None:
    """Raise RunError when *target* is anything but a folder, or holds anything and *overwrite* is not set.

    *reads*: what the result is made from, where it takes the place of the whole folder. Then a mount point is refused,
    and to overwrite what holds one of them, the current folder, or anything but a result.
    """
    with storage_errors(target):
        refuse_file(target)
        holds_any = target.is_dir() and any(target.iterdir())
    if holds_any and not overwrite:
        raise RunError(
            f"{target} already holds a result, which is kept; choose another --output, or replace it with --overwrite."
        )
    if reads is None:
        return
    if os.path.ismount(target):
        raise RunError(f"{target} is a mount point, which stays; give a folder inside, such as {target / 'result'}.")
    if not holds_any:
        return
    real = target.resolve()
    for path in [*(Path(each) for each in reads if each), Path.cwd()]:
        if path.resolve().is_relative_to(real):
            raise RunError(f"{target} would be replaced, and with it {path}, which is in use; choose another --output.")
    folders = {path.name for path in real.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if folders - _IN_RESULTS or not any((real / name).exists() for name in _RESULTS):
        raise RunError(
            f"{target} holds other things than one result, and --overwrite replaces nothing else; choose another "
            "--output, or remove the folder."
        )


def refuse_file(target: Path) -> None:
    """Raise RunError where *target* is there and no folder: a file, or a device such as /dev/null."""
    if target.exists() and not target.is_dir():
        kind = "a file" if target.is_file() else "no folder"
        raise RunError(f"{target} is {kind}; --output wants a folder.")


def refuse_language_model(folder: Path) -> None:
    """Raise ModelError where *folder* holds a causal language model, which is used as its artifact, not as it is."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return  # whoever reads it for real says what is wrong
    if any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in named):
        raise ModelError(
            f"{folder} is a causal language model ({named[0]}); eval, bench and serve take its artifact, which pst "
            "export makes. In transformers, AutoModelForCausalLM.from_pretrained opens it as it is."
        )


def write_json(path: Path, value: Any) -> None:
    """Write *value* as indented JSON, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, error: type[PSTError], remedy: str) -> dict[str, Any]:
    """Read a JSON object; raise *error*, ending in *remedy*, where the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing; {remedy}") from None
    except (OSError, ValueError) as cause:
        raise error(f"{path} is not readable JSON ({cause}); {remedy}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} does not hold a JSON object; {remedy}")
    return value


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where is kept what can be made again, for all runs of this user; not created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-pst"


def resolve_model(path: Path) -> Path:
    """The Hugging Face folder that *path* stands for: a run's ``model`` folder, or *path* itself."""
    return path / "model" if (path / "model" / "config.json").is_file() else path
