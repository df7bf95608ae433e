"""The accuracy of every method on several data sets, from the same model, in one table.

    python -m benchmarks.accuracy --model M --data data/cola data/sst2 data/mrpc \\
        --output runs/accuracy --seeds 3 --jobs 8 --datasets-at-once 3 --set precision=bf16 --set-for mrpc steps=600

Each data set is a comparison as ``pst compare`` makes it, in OUTPUT/NAME, NAME being the last part of its path:
finished runs are kept, and a stopped one goes on, when the same command is given again. The sparse runs start from the
dense run of their seed, unless --no-from-dense. With --datasets-at-once above 1 each data set runs in its share of the
GPUs, with its messages in OUTPUT/NAME.log; --jobs is then the number of runs at a time in each.

Prints a table of all, and writes it to benchmarks/accuracy_<device>_<yyyymm>.md and, with every cell, options, machines
and versions, .json. --report-only trains nothing and reads what is in OUTPUT.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy_report import build, markdown, text
from benchmarks.reports import report_path
from pst.compare.environment import environment
from pst.compare.jobs import close, stop
from pst.errors import ConfigError, RunError
from pst.files import atomic_file, read_json, write_json
from pst.progress import note

METHODS = ("dense", "magnitude", "movement", "soft_movement", "pst", "pst-faithful")
POLL_S = 0.1
STOP_S = 120.0
"""How long a comparison may take for the checkpoints of its runs after it was asked to stop."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is not there yet, print the table; returns where the JSON report lies.

    Raises ConfigError for options that do not go together, RunError where a comparison failed as a whole, and
    pst.train.InterruptedRun after a signal.
    """
    options = _options(arguments)
    folders = _folders(options)
    if not options.report_only:
        _run_all(options, folders)
    reports = {
        name: read_json(folder / "report.json", RunError, "run this again without --report-only.")
        for name, folder in folders.items()
    }
    machine = environment(
        command=shlex.join(["python", "-m", "benchmarks.accuracy", *options.given]), jobs=options.jobs
    )
    content = build(reports, metrics=_by_name(options.metric, "--metric"), environment=machine)
    first = next(iter(reports.values()))
    device = "cpu" if "device=cpu" in first["options"]["set"] else "auto"
    report: Path = options.report or report_path("accuracy", first["environment"], device=device)
    write_json(report, content)
    with atomic_file(report.with_suffix(".md")) as partial:
        partial.write_text(markdown(content), encoding="utf-8")
    print(text(content))
    print(f"Written to {report} and {report.with_suffix('.md').name}.")
    return report


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id that every dense run starts from")
    parser.add_argument("--data", nargs="+", default=[], help="data sets; of --report-only, by default all in OUTPUT")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparisons")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of each data set (1)")
    parser.add_argument("--datasets-at-once", type=int, default=1, metavar="N", help="data sets at a time (1)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=" ".join(METHODS))
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"], help="unstructured 2:4")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.9], help="of unstructured (0.5 0.9)")
    start = "sparse runs start from the dense run of their seed (they do)"
    parser.add_argument("--from-dense", action=argparse.BooleanOptionalAction, default=True, help=start)
    parser.add_argument("--teacher-from-dense", action="store_true", help="the dense run teaches its sparse runs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="[METHOD.]KEY=VALUE")
    for_one = ("NAME", "KEY=VALUE")
    parser.add_argument("--set-for", nargs="+", action="append", default=[], metavar=for_one, help="for one data set")
    parser.add_argument("--metric", nargs="+", default=[], metavar="NAME=METRIC", help="not the data's own")
    parser.add_argument("--report", type=Path, help="JSON file to write, in place of the one in benchmarks/")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    if not options.report_only and not (options.model and options.data):
        parser.error("--model and --data are needed, unless --report-only.")
    if options.datasets_at_once < 1:
        parser.error(f"--datasets-at-once is {options.datasets_at_once}; it must be at least 1.")
    return options


def _folders(options: argparse.Namespace) -> dict[str, Path]:
    """The comparison of each data set by its name, in the order given."""
    if options.report_only and not options.data:
        found = {path.parent.name: path.parent for path in sorted(options.output.glob("*/report.json"))}
        if not found:
            raise RunError(f"{options.output} holds no finished comparison; run this without --report-only first.")
        return found
    names = [Path(data).name for data in options.data]
    if len(set(names)) < len(names):
        raise ConfigError(f"--data names {', '.join(names)}: two of one name would share a folder; rename one.")
    return {name: options.output / name for name in names}


def _by_name(items: Sequence[str], flag: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    if not all(equals and value for _, equals, value in pairs):
        raise ConfigError(f"{flag} {' '.join(items)} is not of the form NAME=VALUE.")
    return {name: value for name, _, value in pairs}


def _arguments(options: argparse.Namespace, folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What pst.compare.compare is called with for each data set, as JSON values."""
    own: dict[str, list[str]] = {name: [] for name in folders}
    for name, *items in options.set_for:
        if name not in own:
            raise ConfigError(f"--set-for {name} is not among the data sets {', '.join(own)}.")
        own[name] += items
    return {
        name: {
            "model": options.model,
            "data": data,
            "methods": options.methods,
            "patterns": options.patterns,
            "sparsities": options.sparsities,
            "seeds": options.seeds,
            "output": str(folders[name]),
            "sets": [*options.set, *own[name]],
            "from_dense": options.from_dense,
            "teacher_from_dense": options.teacher_from_dense,
            "jobs": options.jobs,
            "command": shlex.join(["python", "-m", "benchmarks.accuracy", *options.given]),
        }
        for name, data in zip(folders, options.data, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class _Running:
    name: str
    slot: int
    """0 to datasets_at_once - 1, each held by one data set at a time."""
    process: "subprocess.Popen[bytes]"


def _run_all(options: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Every comparison, in processes that end with this one. The others go on when one fails."""
    from pst.signals import stop_signals
    from pst.train import InterruptedRun

    waiting = list(_arguments(options, folders).items())
    slots = min(options.datasets_at_once, len(waiting))
    running, failed = list[_Running](), list[str]()
    options.output.mkdir(parents=True, exist_ok=True)
    with stop_signals() as stopped:
        try:
            while waiting or running:
                if stopped():
                    raise InterruptedRun("Stopped; the same command goes on from there.")
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    close(one.process)
                    note(f"{one.name}: {'failed' if one.process.returncode else 'finished'}.")
                    failed += [one.name] if one.process.returncode else []
                while waiting and len(running) < slots:
                    name, arguments = waiting.pop(0)
                    slot = min(set(range(slots)) - {one.slot for one in running})
                    running.append(_start(name, arguments, options.output, slot=slot, slots=slots))
                time.sleep(POLL_S)
        finally:
            stop([one.process for one in running], seconds=STOP_S)
    if failed:
        where = "above" if slots == 1 else f"in {options.output}/NAME.log"
        raise RunError(f"The comparison failed for {', '.join(failed)}; why stands {where}. The others are kept.")


def _start(name: str, arguments: dict[str, Any], output: Path, *, slot: int, slots: int) -> _Running:
    surroundings = dict(os.environ)
    with ExitStack() as stack:
        log = None
        if slots > 1:
            log = stack.enter_context((output / f"{name}.log").open("w", encoding="utf-8"))
            surroundings |= _share_of_the_machine(slot, slots=slots, jobs=arguments["jobs"])
            note(f"{name}: started; its messages are in {output / name}.log.")
        else:
            note(f"{name}: started.")
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.accuracy_dataset", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=surroundings,
            start_new_session=True,  # Ctrl-C on the terminal reaches this process alone, which hands it on
        )
    return _Running(name=name, slot=slot, process=process)


def _share_of_the_machine(slot: int, *, slots: int, jobs: int) -> dict[str, str]:
    """Environment variables: GPUs slot, slot + slots, ..., or one that several slots share; a share of the threads."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cpus // (slots * jobs))))}
    if len(gpus) > 1:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::slots] or [gpus[slot % len(gpus)]])
    return found


if __name__ == "__main__":
    main()
