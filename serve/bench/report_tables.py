"""The tables of a report, as a header and rows of text, for report.md and the terminal alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve.bench.timing import Speedup

if TYPE_CHECKING:
    from serve.bench.report import Report

Table = tuple[list[str], list[list[str]]]


def show_ratio(speedup: Speedup) -> str:
    """``1.50×, 1.45 to 1.55``."""
    if speedup.low is None or speedup.high is None:
        return f"{speedup.ratio:.2f}×, too few rounds for an interval"
    return f"{speedup.ratio:.2f}×, {speedup.low:.2f} to {speedup.high:.2f}"


def artifact_table(report: "Report") -> Table:
    """One row for each artifact; columns that nothing is known of are left out."""
    header = [
        "artifact",
        "engine",
        "pattern",
        "sparsity",
        "size MB",
        "plan MB",
        "load ms",
        "host MB",
        "GPU MB",
        "accuracy",
    ]
    rows = []
    for subject in report.subjects:
        score, memory = subject.accuracy, subject.memory
        rows.append(
            [
                subject.name,
                subject.engine,
                subject.pattern or "unknown",
                "" if subject.sparsity is None else f"{subject.sparsity:.1%}",
                f"{subject.size_bytes / 1e6:.1f}",
                megabytes(subject.plan_bytes),
                f"{subject.load_ms:.0f}",
                megabytes(None if memory is None else memory.host_peak),
                megabytes(None if memory is None else memory.device),
                "not measured" if score is None else f"{score.metric} {score.value:.4f} ({score.rows} rows)",
            ]
        )
    return known_columns(header, rows, optional=("plan MB", "host MB", "GPU MB"))


def latency_table(report: "Report") -> Table:
    """One row for each artifact on each workload, by workload; columns that nothing is known of are left out."""
    tokens = ["ms/token", "tokens/s"]
    header = ["workload", "artifact", "first ms", "p50 ms", "p90 ms", "p99 ms", "mean ms", "std ms", "rows/s", *tokens]
    header += ["mJ", "runs", "warm-up", "ratio"]
    workloads = list(dict.fromkeys(entry.workload for entry in report.measurements))
    rows = []
    for entry in sorted(report.measurements, key=lambda entry: workloads.index(entry.workload)):
        latency = entry.latency
        rows.append(
            [
                entry.workload,
                entry.subject,
                *(_number(value) for value in (latency.first, latency.p50, latency.p90, latency.p99)),
                *(_number(value) for value in (latency.mean, latency.std)),
                _number(latency.throughput, digits=1),
                _number(entry.per_token_ms),
                _number(entry.tokens_per_s, digits=1),
                _number(None if entry.energy is None else entry.energy.mj_per_inference, digits=1),
                str(len(latency.samples)),
                str(latency.warmup),
                "baseline" if entry.speedup is None else show_ratio(entry.speedup),
            ]
        )
    return known_columns(header, rows, optional=("first ms", *tokens, "mJ"))


def known_columns(header: list[str], rows: list[list[str]], *, optional: Sequence[str]) -> Table:
    """The table without those of the *optional* columns that are empty in every row."""
    kept = [index for index, title in enumerate(header) if title not in optional or any(row[index] for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def megabytes(count: int | None) -> str:
    """Millions of bytes; empty where unknown."""
    return "" if count is None else f"{count / 1e6:.1f}"


def _number(value: float | None, *, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def machine_lines(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured on, as labels and values; environment as in report.json, also of an old report."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    memory, clocks = environment["memory_gib"], environment.get("gpu_clocks")
    return [
        ("Command", f"`{environment['command']}`" if environment["command"] else "called from Python"),
        ("Time", environment["time"]),
        ("CPU", f"{environment['cpu']}, {environment['cpus_usable']} of {environment['cpus_total']} CPUs usable"),
        ("Threads per inference", str(environment["threads"])),
        ("Memory", "unknown" if memory is None else f"{memory} GiB"),
        ("GPU", "; ".join(environment["gpus"]) or "none"),
        *([("GPU clocks before the measurement", "; ".join(clocks))] if clocks else []),
        ("System", environment["os"]),
        ("Load average before the measurement", str(environment["load_average_1min"])),
        ("Versions", versions),
    ]
