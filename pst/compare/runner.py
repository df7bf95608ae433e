"""``compare``: check the grid, train its cells one after the other or several at a time, write the report.

A cell is an ordinary run folder, trained with resume: finished runs are kept, an interrupted one goes on at its
checkpoint. A run that fails (diverges, does not fit the GPU) is tried again by the next start of the same command.
The report is written anew after each run, so that there is one of what is finished, whatever becomes of the machine.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pst.compare import plot
from pst.compare.attempt import announce, attempt, is_finished, missing_dense
from pst.compare.environment import environment
from pst.compare.grid import Cell, build, differences
from pst.compare.jobs import several_at_a_time
from pst.compare.report import REPORT_FILES, Report, make_report
from pst.compare.results import CellResult
from pst.config import TrainConfig
from pst.errors import ConfigError, RunError
from pst.files import read_json, refuse_file, remove, storage_errors, write_json
from pst.patterns import parse_pattern
from pst.progress import note
from pst.run_folder import NOT_COMPARED
from pst.settings import resolve

MARKER = "comparison.json"
"""The options, in the folder of every comparison: what else is there may be replaced with --overwrite."""


def compare(
    *,
    model: str,
    data: str,
    methods: Sequence[str],
    patterns: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    output: Path,
    sets: Sequence[str] = (),
    from_dense: bool = False,
    teacher_from_dense: bool = False,
    jobs: int = 1,
    overwrite: bool = False,
    command: str = "",
) -> Report:
    """Train every cell of the grid, seeds 0 to *seeds* - 1, and write the report to the folder *output*.

    *sets*: ``key=value`` for all runs, ``METHOD.key=value`` for one method's. *from_dense*: the sparse runs start from
    the dense run of their seed; *teacher_from_dense*: they learn from it. *jobs*: runs at a time, each a process.

    Raises ConfigError, PatternError, ModelError or DataError before the first run for a grid that cannot be run,
    RunError where *output* is in the way or every run failed, StorageError, and pst.train.InterruptedRun after a
    signal, with a checkpoint written.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("pst compare starts its runs itself; call it without torchrun, and use --jobs for several.")
    runs = output / "runs"
    cells = build(
        model=model,
        data=data,
        methods=methods,
        patterns=patterns,
        sparsities=sparsities,
        seeds=seeds,
        runs=runs,
        sets=sets,
        from_dense=from_dense,
        teacher_from_dense=teacher_from_dense,
    )
    options = {
        "model": model,
        "data": data,
        "methods": list(methods),
        "patterns": list(patterns),
        "sparsities": list(sparsities),
        "seeds": seeds,
        "set": list(sets),
        "from_dense": from_dense,
        "teacher_from_dense": teacher_from_dense,
    }
    _refuse_others(output, cells, overwrite=overwrite)
    kept = {cell.name for cell in cells if is_finished(runs / cell.name) and not overwrite}
    waiting = [cell for cell in cells if cell.name not in kept]
    errors: dict[str, str] = {}
    if waiting:
        if kept:
            note(f"{len(kept)} of {len(cells)} runs are finished and kept.")
        _check_before_the_first(cells[0].config, [cell.pattern for cell in waiting])
        if overwrite:
            for path in (runs, *(output / name for name in REPORT_FILES)):
                remove(path)
        write_json(output / MARKER, options)
    machine = environment(command=command, jobs=jobs)

    def report_so_far() -> Report:
        """Of the cells that are finished or have failed."""
        told = [cell for cell in cells if cell.name in errors or is_finished(runs / cell.name)]
        results = [_result(cell, runs / cell.name, errors.get(cell.name)) for cell in told]
        return make_report(results, environment=machine, options=options, kept=len(kept), of=len(cells))

    def after_a_run() -> None:
        if any(is_finished(runs / cell.name) for cell in cells):
            report_so_far().write(output)

    if waiting:
        with _where_it_stopped(cells, runs):
            if jobs == 1:
                _one_by_one(waiting, runs, errors=errors, after=after_a_run)
            else:
                several_at_a_time(waiting, runs, jobs=jobs, errors=errors, after=after_a_run)
    report = plot.draw(report_so_far(), output)
    report.write(output)
    return report


def _one_by_one(waiting: Sequence[Cell], runs: Path, *, errors: dict[str, str], after: Callable[[], None]) -> None:
    """Train *waiting*, put the sentences of those that fail into *errors*, and call *after* after each."""
    start = time.monotonic()
    for index, cell in enumerate(waiting):
        left = (time.monotonic() - start) / index * (len(waiting) - index) if index else None
        announce(cell, index + 1, len(waiting), left_s=left)
        error = missing_dense(cell, runs) or attempt(cell.config, runs / cell.name)
        if error is not None:
            errors[cell.name] = error
            note(f"Failed: {cell.label}: {error}")
        after()


@contextmanager
def _where_it_stopped(cells: Sequence[Cell], runs: Path) -> Iterator[None]:
    from pst.train import InterruptedRun

    try:
        yield
    except InterruptedRun as stop:
        finished = sum(is_finished(runs / cell.name) for cell in cells)
        raise InterruptedRun(
            f"Stopped with {finished} of {len(cells)} runs finished; the same command goes on from there."
        ) from stop


def _refuse_others(output: Path, cells: Sequence[Cell], *, overwrite: bool) -> None:
    """Raise RunError where *output* holds anything but a comparison, or, to be kept, a run with other options."""
    with storage_errors(output):
        refuse_file(output)
        holds_any = output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir())
        if holds_any and not (output / MARKER).is_file():
            raise RunError(f"{output} holds something else than a comparison, which is kept; choose another --output.")
    for cell in cells:
        folder = output / "runs" / cell.name
        if overwrite or not (is_finished(folder) or any(folder.glob("checkpoints/*.pt"))):
            continue
        changed = differences(resolve(TrainConfig, file=folder / "config.yaml"), cell.config, ignored=NOT_COMPARED)
        if changed:
            raise RunError(
                f"The run in {folder} is from another configuration ({', '.join(changed[:4])}); repeat the options of "
                "that comparison, delete the folder to train it again, or choose another --output."
            )


def _check_before_the_first(config: TrainConfig, patterns: Sequence[str]) -> None:
    """Load the model and the data once, and hold each pattern against each weight, so that no run fails of these."""
    from pst import tasks
    from pst.sparsify import prunable_weights

    specs = [spec for spec in dict.fromkeys(patterns) if spec != "dense"]
    for item in prunable_weights(tasks.prepare(config).model):
        stored = item.weight.shape
        shape = (stored[1 - item.axis] // item.parts, stored[item.axis])
        for spec in specs:
            parse_pattern(spec).check(shape, axis=1, name=item.name)


def _result(cell: Cell, folder: Path, error: str | None) -> CellResult:
    if error is not None:
        return CellResult(cell=cell, error=error)
    found = read_json(folder / "model" / "sparsity.json", RunError, "delete the run's folder to train it again.")
    return CellResult(
        cell=cell,
        metrics=found["metrics"],
        measured_sparsity=found["sparsity"]["measured"],
        train_seconds=found["train_seconds"],
        steps=found["steps"],
        peak_memory_bytes=found.get("peak_memory_bytes"),
        trainable_parameters=found.get("trainable_parameters"),
        task=found["task"],
        teacher=found.get("teacher", ""),
        rows={name: part.get("sha256", "") for name, part in found["data"].items() if isinstance(part, dict)},
    )
