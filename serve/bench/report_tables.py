"""The tables of a report, as a header and rows of text, for report.md and the terminal alike."""

from typing import TYPE_CHECKING, Any

from serve.bench.timing import Speedup

if TYPE_CHECKING:
    from serve.bench.report import Report


def show_ratio(speedup: Speedup) -> str:
    """``1.50×, 1.45 to 1.55``."""
    if speedup.low is None or speedup.high is None:
        return f"{speedup.ratio:.2f}×, too few rounds for an interval"
    return f"{speedup.ratio:.2f}×, {speedup.low:.2f} to {speedup.high:.2f}"


def artifact_table(report: "Report") -> tuple[list[str], list[list[str]]]:
    header = ["artifact", "engine", "pattern", "sparsity", "size MB", "load ms", "accuracy"]
    rows = []
    for subject in report.subjects:
        score = subject.accuracy
        rows.append(
            [
                subject.name,
                subject.engine,
                subject.pattern or "unknown",
                "" if subject.sparsity is None else f"{subject.sparsity:.1%}",
                f"{subject.size_bytes / 1e6:.1f}",
                f"{subject.load_ms:.0f}",
                "not measured" if score is None else f"{score.metric} {score.value:.4f} ({score.rows} rows)",
            ]
        )
    return header, rows


def latency_table(report: "Report") -> tuple[list[str], list[list[str]]]:
    generated = ["ms/token", "tokens/s"] if any(entry.new_tokens for entry in report.measurements) else []
    numbers_of = ["p50 ms", "p90 ms", "p99 ms", "mean ms", "std ms", "rows/s"]
    header = ["workload", "artifact", "first ms", *numbers_of, *generated, "runs", "warm-up", "ratio"]
    workloads = list(dict.fromkeys(entry.workload for entry in report.measurements))
    rows = []
    for entry in sorted(report.measurements, key=lambda entry: workloads.index(entry.workload)):
        latency = entry.latency
        numbers = (latency.p50, latency.p90, latency.p99, latency.mean, latency.std)
        tokens = [
            "" if number is None else f"{number:.{digits}f}"
            for number, digits in ((entry.per_token_ms, 3), (entry.tokens_per_s, 1))
        ]
        rows.append(
            [
                entry.workload,
                entry.subject,
                "" if latency.first is None else f"{latency.first:.3f}",
                *(f"{number:.3f}" for number in numbers),
                f"{latency.throughput:.1f}",
                *(tokens if generated else ()),
                str(len(latency.samples)),
                str(latency.warmup),
                "baseline" if entry.speedup is None else show_ratio(entry.speedup),
            ]
        )
    return header, rows


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first two columns are words, and the rest numbers."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] * 2 + ["---:"] * (len(header) - 2)), *(line(row) for row in rows)]


def machine_lines(environment: dict[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    memory = environment["memory_gib"]
    return [
        ("Command", f"`{environment['command']}`" if environment["command"] else "called from Python"),
        ("Time", environment["time"]),
        ("CPU", f"{environment['cpu']}, {environment['cpus_usable']} of {environment['cpus_total']} CPUs usable"),
        ("Threads per inference", str(environment["threads"])),
        ("Memory", "unknown" if memory is None else f"{memory} GiB"),
        ("GPU", "; ".join(environment["gpus"]) or "none"),
        ("System", environment["os"]),
        ("Load average before the measurement", str(environment["load_average_1min"])),
        ("Versions", versions),
    ]
