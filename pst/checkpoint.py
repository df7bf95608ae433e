"""Checkpoints of a run: written whole or not at all, the last two kept, a damaged one passed over for the one before.

DIR/checkpoints/step-00000100.pt      model, optimizer, random states, step, configuration
"""

import random
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pst.distributed import Processes
from pst.errors import RunError
from pst.files import atomic_file, remove
from pst.progress import note

SCHEMA_VERSION = 2
KEPT = 2
USUAL = 100
"""Steps between checkpoints, unless the user says otherwise."""
SHARE = 0.05
"""Of the time that may go into writing them."""


class Pace:
    """When a checkpoint is due."""

    def __init__(self, every: int | None, group: Processes) -> None:
        """*every* steps; 0 is never. None: every USUAL steps, as long as writing takes up to SHARE of the time."""
        self.every, self.adaptive, self.group = USUAL if every is None else every, every is None, group
        self.not_before = 0.0

    def is_due(self, done: int) -> bool:
        """After *done* steps; the first process decides for all."""
        if not self.every or done % self.every:
            return False
        return self.group.gather(not self.adaptive or time.monotonic() >= self.not_before)[0]

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the writing of one."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.not_before = ended + (ended - began) / SHARE


def random_state() -> dict[str, Any]:
    """The state of every generator that this process draws from in training."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),  # plain numbers, so that loading a checkpoint runs no code
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue from what ``random_state`` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(folder: Path, *, step: int, content: Mapping[str, Any]) -> Path:
    """Write the checkpoint of *step* beside its name, flush, rename; then drop all but the last two.

    Later steps go too: a run only meets such a file when it was damaged and passed over. Raises StorageError where
    the disk refuses; the checkpoints that are there stay then.
    """
    target = folder / f"step-{step:08d}.pt"
    with atomic_file(target) as partial, partial.open("wb") as file:  # torch's own writer hides why the disk refused
        torch.save({"schema_version": SCHEMA_VERSION, "step": step, **content}, file)
    found = _found(folder)
    kept = found[: found.index(target) + 1][-KEPT:]
    for other in set(found).difference(kept):
        remove(other)
    return target


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def load_last(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, or None where there is no file at all.

    Raises RunError when files are there but none can be read.
    """
    found = _found(folder)
    for path in reversed(found):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # torch does not compare the checksums
                    raise zipfile.BadZipFile
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if content["schema_version"] != SCHEMA_VERSION:
                raise RunError(
                    f"{path} was written by another version of this program (schema {content['schema_version']}, "
                    f"this one reads {SCHEMA_VERSION}); start again with --overwrite."
                )
            return content
        except RunError:
            raise
        except Exception as error:
            note(f"Checkpoint {path} is damaged ({type(error).__name__}); trying the one before.")
    if found:
        raise RunError(f"No checkpoint in {folder} can be read; start the run again with --overwrite.")
    return None
