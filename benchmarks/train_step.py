"""One training step of BERT-base, dense and sparse: milliseconds, memory, trainable parameters.

    python -m benchmarks.train_step [--batch 32 --length 128] [--precisions tf32 bf16] [--patterns unstructured 2:4]
    python -m benchmarks.train_step --profile pst-2:4 --precisions bf16

A step is what benchmarks/step_rows.py says, the same for all rows but for what trains: gradients to None, masks where
there are any, forward with an attention mask, backward, gradients clipped to a norm of 1, fused AdamW. Weights are
random, ids come from a few fixed batches on the device, and every row of a batch is as long as the others.

The rows are measured in turn, and all of them again in every round, so that a drift of the machine hits all alike. In
its turn a row is the only model on the device: it is built, warmed up, timed with its peak memory, and freed. Prints a
table with the goals, and writes it with options, rounds, machine and versions to
benchmarks/train_step_<device>_<yyyymm>.json. GB is what tensors took at most, on which the goals count; held GB what
torch had of the GPU for them.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.reports import report_path, text_table
from benchmarks.step_rows import KINDS, SHAPES, RowSpec, arithmetic, random_batches, random_bert, row_specs, start
from benchmarks.step_timing import Round, distribution, free, profile, require_finite, time_steps
from pst.compare.environment import environment
from pst.files import write_json
from pst.progress import note

SCHEMA_VERSION = 1
TIME_TO_DENSE = {"tf32": 1.0, "bf16": 0.75}
MEMORY_TO_DENSE = 0.8
TIME_TO_LITERAL = 1 / 3
PROFILED_STEPS = 5


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Measure, print the table, and return where the report lies; None after --profile, which writes none."""
    options = _options(arguments)
    device = torch.device(options.device)
    specs = [
        spec
        for precision in options.precisions
        for spec in row_specs(options.rows, options.patterns, options.sparsity, precision)
    ]
    base = random_bert(options.model_shape)
    batches = random_batches(base, batch=options.batch, length=options.length, device=device)
    if options.profile:
        _profile(options, base, batches, device)
        return None
    rounds: dict[RowSpec, list[Round]] = {spec: [] for spec in specs}
    for number in range(options.rounds):
        for spec in specs:
            found = _measure(spec, base, batches, options, device)
            rounds[spec].append(found)
            median = distribution(found.times_ms)["median"]
            note(f"Round {number + 1} of {options.rounds}: {spec.precision} {spec.name} {median:.2f} ms")
    rows = _rows(rounds)
    goals = _goals(rows)
    machine = environment(command=shlex.join(["python", "-m", "benchmarks.train_step", *options.given]), jobs=1)
    kept = ("model_shape", "batch", "length", "precisions", "patterns", "rows", "sparsity", "rounds", "steps", "warmup")
    content = {"schema_version": SCHEMA_VERSION, "environment": machine}
    content |= {"options": {name: getattr(options, name) for name in kept}, "rows": rows, "goals": goals}
    report: Path = options.output or report_path("train_step", machine, device=device.type)
    write_json(report, content)
    print(_table(rows))
    for goal in goals:
        print(f"{goal['verdict']:<12} {goal['text']}")
    print(f"Written to {report}.")
    return report


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--batch", type=int, default=32, help="rows a step (32)")
    parser.add_argument("--length", type=int, default=128, help="tokens a row (128)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "tf32", "bf16"), default=["tf32", "bf16"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"], help="unstructured 2:4")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of patterns that do not fix their own (0.5)")
    parser.add_argument("--rows", nargs="+", choices=KINDS, default=list(KINDS), help="what is measured; all")
    parser.add_argument("--rounds", type=int, default=3, help="how often each row has its turn (3)")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a turn (40)")
    parser.add_argument("--warmup", type=int, default=15, help="steps of a turn before the timed ones (15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write, in place of the one in benchmarks/")
    parser.add_argument("--profile", metavar="ROW", help="instead: kernels and operators of a row such as pst-2:4")
    options = parser.parse_args(arguments)
    for name in ("batch", "length", "rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    return options


def _measure(spec: RowSpec, base: torch.nn.Module, batches: Any, options: argparse.Namespace, device: Any) -> Round:
    """One turn; nothing of the row is left afterwards."""
    resident = free(device)
    with arithmetic(spec.precision):
        training = start(base, spec, batches, device)
        times, wall, peaks, loss = time_steps(training.step, steps=options.steps, warmup=options.warmup, device=device)
    require_finite(loss, f"{spec.precision} {spec.name}")
    return Round(
        times_ms=times,
        wall_ms=wall,
        peak_memory_bytes=peaks and peaks[0],
        peak_reserved_bytes=peaks and peaks[1],
        resident_bytes=resident,
        loss=loss,
        trainable_parameters=training.trainable_parameters,
    )


def _profile(options: argparse.Namespace, base: torch.nn.Module, batches: Any, device: torch.device) -> None:
    for precision in options.precisions:
        known = row_specs(KINDS, options.patterns, options.sparsity, precision)
        spec = next((spec for spec in known if spec.name == options.profile), None)
        if spec is None:
            sys.exit(f"--profile is {options.profile}; the rows are {', '.join(one.name for one in known)}.")
        free(device)
        with arithmetic(precision):
            training = start(base, spec, batches, device)
            print(f"{precision} {spec.name}, {PROFILED_STEPS} steps after {options.warmup}")
            print(profile(training.step, steps=PROFILED_STEPS, warmup=options.warmup, device=device))
        del training


def _rows(rounds: dict[RowSpec, list[Round]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for spec, found in rounds.items():
        peaks = [one.peak_memory_bytes for one in found if one.peak_memory_bytes is not None]
        reserved = [one.peak_reserved_bytes for one in found if one.peak_reserved_bytes is not None]
        rows.append(
            {
                "row": spec.name,
                "kind": spec.kind,
                "pattern": spec.pattern,
                "sparsity": spec.sparsity,
                "precision": spec.precision,
                "step_ms": distribution([time for one in found for time in one.times_ms]),
                "wall_ms": sum(one.wall_ms for one in found) / len(found),
                "timed_steps": sum(len(one.times_ms) for one in found),
                "peak_memory_bytes": max(peaks, default=None),
                "peak_reserved_bytes": max(reserved, default=None),
                "trainable_parameters": found[0].trainable_parameters,
                "rounds": [
                    {
                        "step_ms": distribution(one.times_ms),
                        "wall_ms": one.wall_ms,
                        "peak_memory_bytes": one.peak_memory_bytes,
                        "peak_reserved_bytes": one.peak_reserved_bytes,
                        "resident_bytes": one.resident_bytes,
                        "loss": one.loss,
                    }
                    for one in found
                ],
            }
        )
    for row in rows:
        row["to_dense"] = _ratios(row, _find(rows, "dense", None, row["precision"]))
        row["to_literal"] = _ratios(row, _find(rows, "literal", row["pattern"], row["precision"]))
    return rows


def _find(rows: list[dict[str, Any]], kind: str, pattern: str | None, precision: str) -> dict[str, Any] | None:
    wanted = (kind, pattern, precision)
    return next((row for row in rows if (row["kind"], row["pattern"], row["precision"]) == wanted), None)


def _ratios(row: dict[str, Any], other: dict[str, Any] | None) -> dict[str, float | None] | None:
    """Medians and peaks of *row* over those of *other*."""
    if other is None:
        return None
    peaks = row["peak_memory_bytes"], other["peak_memory_bytes"]
    memory = peaks[0] / peaks[1] if all(peaks) else None
    return {"time": row["step_ms"]["median"] / other["step_ms"]["median"], "memory": memory}


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What PST is to reach, at each pattern and precision, and whether it did."""
    goals = []
    for row in rows:
        if row["kind"] not in ("pst", "taught"):
            continue
        wanted = [("time", "dense", TIME_TO_DENSE.get(row["precision"])), ("memory", "dense", MEMORY_TO_DENSE)]
        for what, other, limit in [*wanted, ("time", "literal", TIME_TO_LITERAL)]:
            if limit is None:
                continue
            value = (row[f"to_{other}"] or {}).get(what)
            verdict = "not measured" if value is None else "met" if value <= limit else "not met"
            figure = "-" if value is None else f"{value:.3f}x"
            text = f"{row['precision']} {row['row']}: {what} {figure} of {other}, at most {_limit(limit)}"
            goals.append({"row": row["row"], "precision": row["precision"], "what": what, "of": other})
            goals[-1] |= {"limit": limit, "value": value, "verdict": verdict, "text": text}
    return goals


def _limit(limit: float) -> str:
    return "1/3" if math.isclose(limit, 1 / 3) else f"{limit:g}x"


def _table(rows: list[dict[str, Any]]) -> str:
    header = ["row", "precision", "ms", "p10", "p90", "wall ms", "GB", "held GB", "trainable"]
    header += ["time/dense", "GB/dense", "time/literal"]
    lines = []
    for row in rows:
        step, peak = row["step_ms"], row["peak_memory_bytes"]
        dense, literal = row["to_dense"] or {}, row["to_literal"] or {}
        line = [row["row"], row["precision"], *(f"{step[name]:.2f}" for name in ("median", "p10", "p90"))]
        line += [f"{row['wall_ms']:.2f}"]
        line += ["-" if value is None else f"{value / 1e9:.2f}" for value in (peak, row["peak_reserved_bytes"])]
        line += [f"{row['trainable_parameters']:,}"]
        ratios = (dense.get("time"), dense.get("memory"), literal.get("time"))
        lines.append([*line, *("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)])
    return text_table(header, lines, left=2)


if __name__ == "__main__":
    main()
