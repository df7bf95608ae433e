"""What scripts that build artifacts and measure them by ``pst bench`` share: options, a folder to work in, a report."""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reports import report_path
from pst.files import write_json
from pst.revision import git_revision
from serve.bench.runner import bench
from serve.bench.workload import parse_shapes


def options(description: str | None, *, shapes: str, runs: int) -> argparse.ArgumentParser:
    """A parser with the options that all of them have; *shapes* and *runs* are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder of the report (benchmarks)")
    parser.add_argument("--engine", default="onnxruntime", help="as of pst bench: onnxruntime or onnxruntime-cuda")
    parser.add_argument("--shapes", default=shapes)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--seconds", type=float, default=240.0, help="most seconds for all shapes together")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--spanned", action="store_true", help="as of pst bench")
    parser.add_argument("--work", type=Path, help="folder for models and artifacts; artifacts found there are measured")
    return parser


def run(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[Path, argparse.Namespace], dict[str, Any]],
    *,
    shown: Sequence[str],
) -> None:
    """Write what *measure* finds, working in --work, to NAME_<device>_<yyyymm>.json; print *shown* of each row."""
    work = arguments.work or Path(tempfile.mkdtemp(prefix=f"{name}-"))
    try:
        report = measure(work, arguments)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    write(name, report, arguments)
    for row in report["measurements"]:
        print(json.dumps({key: row[key] for key in shown}))


def write(name: str, report: dict[str, Any], arguments: argparse.Namespace) -> Path:
    """Write *report* to NAME_<device>_<yyyymm>.json in --output.

    The engine stands in the name too, but for ONNX Runtime's on the CPU, and whether one plan spans all shapes.
    """
    on_cpu = arguments.engine == "onnxruntime"
    full = "_".join([name, *([] if on_cpu else [arguments.engine]), *(["spanned"] if arguments.spanned else [])])
    path: Path = arguments.output / report_path(full, report["environment"], device="cpu" if on_cpu else "auto").name
    write_json(path, report)
    return path


def measured(
    name: str, artifacts: Sequence[Path], arguments: argparse.Namespace, *, warmup: int, **more: Any
) -> dict[str, Any]:
    """The report of ``pst bench`` over *artifacts*, in turn, with the revision; *more* goes to ``bench``."""
    folder = artifacts[0].parent / "report"
    result = bench(
        artifacts,
        shapes=parse_shapes(arguments.shapes),
        output=folder,
        threads=arguments.threads,
        warmup=warmup,
        runs=arguments.runs,
        command=command(name, arguments),
        engine=arguments.engine,
        budget_s=arguments.seconds,
        spanned=arguments.spanned,
        overwrite=True,
        **more,
    )
    print(result.render(), file=sys.stderr)
    if result.unmeasured:
        raise KeyboardInterrupt  # half a report replaces none that is committed
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for artifact in report["artifacts"]:
        artifact["path"] = artifact["name"]
    return report | {"git_revision": git_revision()}


def command(name: str, arguments: argparse.Namespace) -> str:
    """What repeats the measurement; where its files were kept does not belong to it."""
    flags: list[str] = []
    for key, value in sorted(vars(arguments).items()):
        flag = f"--{key.replace('_', '-')}"
        if key in ("work", "output") or value in (None, False):
            continue
        if value is True:
            flags.append(flag)
        else:
            flags += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *flags])
