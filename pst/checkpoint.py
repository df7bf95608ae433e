"""Checkpoints of a run: written whole or not at all, the last two kept, a damaged one passed over for the one before.

DIR/checkpoints/step-00000100.pt      model, optimizer, random states, step, configuration
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pst.errors import RunError
from pst.files import atomic_file
from pst.progress import note

SCHEMA_VERSION = 1
KEPT = 2


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue from what ``random_state`` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(folder: Path, *, step: int, content: Mapping[str, Any]) -> Path:
    """Write the checkpoint of *step* beside its name, flush, rename; then drop all but the last two."""
    target = folder / f"step-{step:08d}.pt"
    with atomic_file(target) as partial:
        torch.save({"schema_version": SCHEMA_VERSION, "step": step, **content}, partial)
    for old in _found(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
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
            # Our own file: it holds the random states of Python and numpy beside tensors.
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
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
