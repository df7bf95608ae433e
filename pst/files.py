"""Writing files so that a kill at any moment leaves either the old content or the new, never half of one.

Needs the standard library alone: every layer may import it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pst.errors import PSTError, RunError, StorageError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn "no space" and "no permission" below *path* into a StorageError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"No space is left on the disk that holds {path}; free some, or choose another folder with --output."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from error
        raise


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path beside *target* to write to; on success it is flushed to disk and renamed to *target*."""
    partial = _partial(target)
    with storage_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync_file(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside *target*; on success every file in it is flushed and it becomes *target*.

    An existing, non-empty *target* is replaced only with ``overwrite=True``, and only once the new one is whole.
    Raises RunError where it is in the way, StorageError where the disk refuses.
    """
    refuse_existing(target, overwrite=overwrite)
    partial = _partial(target)
    with storage_errors(target):
        try:
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _sync_file(path)
            old = target.with_name(f".{target.name}.old-{os.getpid()}")
            if target.exists():
                os.rename(target, old)
            os.rename(partial, target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise RunError when *target* is a file, or holds anything and *overwrite* is not set."""
    if target.is_file():
        raise RunError(f"{target} is a file; --output wants a folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise RunError(
            f"{target} already holds a result, which is kept; choose another --output, or replace it with --overwrite."
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


def resolve_model(path: Path) -> Path:
    """The Hugging Face folder that *path* stands for: a run's ``model`` folder, or *path* itself."""
    return path / "model" if (path / "model" / "config.json").is_file() else path
