"""Our times beside those of tools that people trust: onnxruntime_perf_test's method, polygraphy and trtexec.

    python -m benchmarks.trusted_tools ARTIFACT... --shapes 1x128 8x128 --threads 2
    python -m benchmarks.trusted_tools ARTIFACT... --shapes 1x128 32x128 --engine onnxruntime-cuda    or tensorrt

A round starts each tool in a process of its own, asks them in turn for a few inferences each, several times and in an
order drawn anew each time, and ends them: two sessions of one file differ by several percent for as long as they live,
so that ratios of the same two would be known well and wrong. The median of ours over the median of theirs is a round's
ratio; the median of the rounds and its interval say whether the two agree within 5%. The ratio of the fastest
inferences stands beside, which other load of the machine moves least.
On a GPU everybody runs the same thing: the plan that our TensorRT engine built, or the graph that our ONNX Runtime
engine fused. Tools that are not installed are named. Needs no torch, and onnx for onnxruntime-cuda alone.

Writes benchmarks/trusted_tools_<engine>_<device>_<yyyymm>.json.
"""

import argparse
import importlib
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.reports import report_path, text_table
from benchmarks.trusted_tools_list import OURS, Block, Job, Tool, has_polygraphy, missing, tools
from export.manifest import Manifest
from pst.errors import EngineError
from pst.files import write_json
from pst.revision import git_revision
from serve.bench.environment import environment
from serve.bench.runner import unique_names
from serve.bench.stopping import Stopped, StopRule
from serve.bench.timing import Speedup, compare_samples
from serve.bench.workload import parse_shapes
from serve.engines import MAY_BE_EMPTY, available_cpus

WITHIN = 0.05
SEED = 0
"""Of the order in each round: drawn, so that nobody always follows the same tool."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tool's time against ours, of one artifact at one shape."""

    artifact: str
    shape: str
    tool: str
    times: str
    """What its time is of, where that differs from ours."""
    alike: bool
    """Whether it is of the same, so that the two should agree."""
    ours: dict[str, float]
    """Milliseconds: median of the rounds' medians, mean of all, and the least of all."""
    theirs: dict[str, float]
    ratio: Speedup
    """Ours over theirs."""
    stopped: Stopped
    samples: dict[str, list[float]] = field(default_factory=dict)
    """Medians of the rounds."""

    @property
    def within(self) -> str:
        """Whether the two agree: yes, no, or undecided where the interval has both in it."""
        return within(self.ratio)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "ratio": self.ratio.to_json(), "within": self.within, "unit": "ms"}


def within(ratio: Speedup) -> str:
    """Whether all of the interval lies within WITHIN of 1, or all of it beyond."""
    if ratio.low is None or ratio.high is None:
        return "undecided"
    if ratio.low >= 1 - WITHIN and ratio.high <= 1 + WITHIN:
        return "yes"
    return "no" if ratio.low > 1 + WITHIN or ratio.high < 1 - WITHIN else "undecided"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, print, write; returns where the report lies."""
    options = _options(arguments)
    threads = options.threads or available_cpus()
    machine = environment(command=_command(options), threads=threads)
    if has_polygraphy():
        machine["versions"]["polygraphy"] = _polygraphy_version()
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name, artifact in unique_names(options.artifacts).items():
        for shape in options.shapes:
            with tempfile.TemporaryDirectory() as folder:
                job = Job(artifact=artifact, shape=shape, engine=options.engine, threads=threads, folder=Path(folder))
                found = measure(name, job, options, failed)
            print(table(found), flush=True)
            rows += found
    absent = missing(options.engine)
    report = {
        "environment": machine, "git_revision": git_revision(), "engine": options.engine, "method": __doc__,
        "within": WITHIN, "rows": [row.to_json() for row in rows], "missing": absent, "failed": failed,
    }  # fmt: skip
    on_cpu = options.engine in ("onnxruntime", "onnxruntime-cpu")
    named = report_path(f"trusted_tools_{options.engine}", machine, device="cpu" if on_cpu else "auto").name
    write_json(options.output / named, report)
    print(f"\n{render(rows, absent, failed)}\n\nWritten to {options.output / named}.")
    return Path(options.output / named)


def measure(artifact: str, job: Job, options: argparse.Namespace, failed: dict[str, str]) -> list[Row]:
    """Rounds of all tools; *failed* gets the last words of those that did not come through all of them."""
    blocks: dict[str, list[Block]] = {}
    known: dict[str, Tool] = {}
    rule = StopRule(runs=options.rounds, precision=0, budget_s=options.seconds)
    order, begin, rounds = random.Random(SEED), time.perf_counter(), 0
    while True:
        with ExitStack() as stack:
            opened = tools(job, stack, failed, order)
            for name, block in one_round(opened, order, options, failed).items():
                blocks.setdefault(name, []).append(block)
        known |= {name: tool for tool in opened for name in tool.names}
        rounds += 1
        seconds = time.perf_counter() - begin
        medians = {name: [block.p50 for block in each] for name, each in blocks.items() if len(each) == rounds}
        if rule.reached(medians, seconds=seconds):
            break
    stopped = rule.stopped(medians, seconds=seconds)
    found = {
        name: {"p50": median(medians[name]), "mean": fmean(x.mean for x in each), "least": min(x.least for x in each)}
        for name, each in blocks.items() if name in medians
    }  # fmt: skip
    return [
        Row(
            artifact=artifact, shape="x".join(map(str, job.shape)), tool=name, times=known[name].names[name],
            alike=known[name].alike(name), ours=found[OURS], theirs=found[name], stopped=stopped,
            ratio=compare_samples(medians[OURS], medians[name]),
            samples={"ours": medians[OURS], "theirs": medians[name]},
        )
        for name in sorted(medians) if name != OURS
    ]  # fmt: skip


def one_round(
    opened: Sequence[Tool], order: random.Random, options: argparse.Namespace, failed: dict[str, str]
) -> dict[str, Block]:
    """What all of *opened* say, asked --turns times. Raises EngineError where ours fails; others are left out."""
    blocks: dict[str, list[Block]] = {}
    left = list(opened)
    for _ in range(options.turns):
        for tool in order.sample(left, len(left)):
            try:
                said = tool.measure(options.runs)
            except EngineError as error:
                if OURS in tool.names:
                    raise
                failed |= dict.fromkeys(tool.names, str(error))
                left.remove(tool)
                continue
            for name, block in said.items():
                blocks.setdefault(name, []).append(block)
    return {
        name: Block(
            p50=median(block.p50 for block in blocks[name]),
            mean=fmean(block.mean for block in blocks[name]),
            least=min(block.least for block in blocks[name]),
        )
        for tool in left
        for name in tool.names
    }


def table(rows: Sequence[Row]) -> str:
    """Ours, theirs, and whether they agree."""
    header = [
        "artifact",
        "shape",
        "tool",
        "within 5%",
        "ours ms",
        "theirs ms",
        "ratio",
        "interval",
        "fastest",
        "rounds",
    ]
    lines = []
    for row in rows:
        low, high = row.ratio.low, row.ratio.high
        interval = "none" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        lines.append(
            [
                row.artifact, row.shape, row.tool, row.within if row.alike else f"{row.within} (not alike)",
                f"{row.ours['p50']:.3f}", f"{row.theirs['p50']:.3f}", f"{row.ratio.ratio:.3f}", interval,
                f"{row.ours['least'] / row.theirs['least']:.3f}",
                str(row.ratio.rounds),
            ]
        )  # fmt: skip
    return text_table(header, lines, left=4)


def render(rows: Sequence[Row], absent: Mapping[str, str], failed: Mapping[str, str]) -> str:
    """The table, what each tool's time is of, and what could not be asked."""
    said = [table(rows), ""]
    said += [f"{tool}: {times}." for tool, times in dict.fromkeys((row.tool, row.times) for row in rows)]
    said += [f"{tool} is not installed; {remedy}." for tool, remedy in absent.items()]
    said += [f"{tool} failed: {why}" for tool, why in failed.items()]
    return "\n".join(said)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path, help="folders of pst export, of encoders")
    parser.add_argument("--shapes", nargs="+", default=["1x128", "8x128"], help="batch x tokens (1x128 8x128)")
    parser.add_argument(
        "--engine", default="onnxruntime", choices=("onnxruntime", "onnxruntime-cuda", "tensorrt"),
        help="ours, (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (all)")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each shape (%(default)s)")
    parser.add_argument("--turns", type=int, default=8, help="of each tool in a round (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed inferences of each tool in a turn (%(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="most seconds for a shape (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder of the report (benchmarks)")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    options.shapes = parse_shapes(",".join(options.shapes))
    for artifact in options.artifacts:
        manifest = Manifest.load(artifact, verify=False)
        if any(MAY_BE_EMPTY in tensor.shape for tensor in manifest.inputs):
            parser.error(
                f"{artifact} is a language model with a cache, which the other tools do not keep; give others."
            )
    return options


def _command(options: argparse.Namespace) -> str:
    """What repeats the measurement; where its files were kept does not belong to it."""
    paths = {str(path): path.name for path in (*options.artifacts, options.output)}
    return shlex.join(["python", "-m", "benchmarks.trusted_tools", *(paths.get(each, each) for each in options.given)])


def _polygraphy_version() -> str:
    return str(importlib.import_module("polygraphy").__version__)


if __name__ == "__main__":
    main()
