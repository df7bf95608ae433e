"""What the tests of comparisons share: a grid of runs of four steps."""

from pathlib import Path
from typing import Any

from pst.compare import Report, compare

STEPS = ("steps=4", "batch_size=8", "device=cpu", "max_length=16")


def run_grid(model: Path, data: Path, output: Path, *, sets: tuple[str, ...] = (), **changes: Any) -> Report:
    """Dense, magnitude and PST, unstructured at one half and 2:4, two seeds; *changes* override any of it."""
    options: dict[str, Any] = {
        "methods": ("dense", "magnitude", "pst"), "patterns": ("unstructured", "2:4"), "sparsities": (0.5,), "seeds": 2,
    }  # fmt: skip
    return compare(model=str(model), data=str(data), output=output, sets=(*STEPS, *sets), **(options | changes))


def run_files(output: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of the runs, with the time of its last change and its content."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (output / "runs").rglob("*") if path.is_file()
    }
