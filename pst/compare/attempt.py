"""One cell: whether it is finished, and an attempt to make it so."""

import gc
from pathlib import Path

from pst.compare.grid import Cell
from pst.config import TrainConfig
from pst.errors import PSTError, StorageError
from pst.progress import note


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a result: sparsity.json is the last file of a model folder that is renamed whole."""
    return (folder / "model" / "sparsity.json").is_file()


def attempt(config: TrainConfig, folder: Path) -> str | None:
    """Train one cell; None, or the sentence that says why it failed.

    Raises StorageError, which every other cell would meet as well, and pst.train.InterruptedRun.
    """
    import torch

    from pst.train import train

    gc.collect()  # the cell before may have left its model in a cycle
    torch.cuda.empty_cache()
    try:
        train(config, folder, resume=True)
    except StorageError:
        raise
    except PSTError as error:
        return str(error)
    except torch.OutOfMemoryError:
        return "The GPU has too little memory for this run; use a smaller --set batch_size, or fewer --jobs."
    return None


def missing_dense(cell: Cell, runs: Path) -> str | None:
    """Why *cell* cannot run, where the dense run that it needs has failed."""
    if cell.dense is None or is_finished(runs / cell.dense):
        return None
    return f"It needs the run {cell.dense}, which failed."


def announce(cell: Cell, number: int, total: int, *, left_s: float | None) -> None:
    """One line before a run: which it is, and for how long the rest will take at the pace so far."""
    left = "" if left_s is None else f"; about {int(left_s) // 60}:{int(left_s) % 60:02d} left for all"
    note(f"Run {number} of {total}: {cell.label}{left}")
