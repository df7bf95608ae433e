"""The tables of a report, as a header and rows of text: for report.md, the terminal and report.html alike.

All are made from the content of report.json, so that they can be made of an old report as well: what it does not have
is left empty, and columns that are empty in every row are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.bench.timing import Speedup

Table = tuple[list[str], list[list[str]]]
Content = Mapping[str, Any]
"""Of report.json, or a part of it."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column, of what is the same in every table, and its titles, which are None where it is left out."""

    title: str | None
    """In report.md and a terminal."""
    page: str | None
    """In report.html, which is narrower."""
    cell: Callable[[Content], str]
    optional: bool = False
    """Whether it goes where nothing is known of it."""


def show_ratio(speedup: Speedup) -> str:
    """``1.50×, 1.45 to 1.55``."""
    if speedup.low is None or speedup.high is None:
        return f"{speedup.ratio:.2f}×, too few rounds for an interval"
    return f"{speedup.ratio:.2f}×, {speedup.low:.2f} to {speedup.high:.2f}"


def artifact_table(report: Content, *, page: bool = False) -> Table:
    """One row for each artifact; *page* is for report.html."""
    return _table(_ARTIFACT, report["artifacts"], page=page)


def latency_table(report: Content, *, page: bool = False) -> Table:
    """One row for each artifact on each workload, by workload."""
    return _table(_LATENCY, by_workload(report), page=page)


def by_workload(report: Content) -> list[Content]:
    """Measurements by workload, in the order of the first artifact's."""
    order = list(dict.fromkeys(entry["workload"] for entry in report["measurements"]))
    return sorted(report["measurements"], key=lambda entry: order.index(entry["workload"]))


def _table(columns: Sequence[Column], entries: Sequence[Content], *, page: bool) -> Table:
    shown = [(title, each) for each in columns if (title := each.page if page else each.title) is not None]
    rows = [[each.cell(entry) for _, each in shown] for entry in entries]
    return known_columns(
        [title for title, _ in shown], rows, optional=[title for title, each in shown if each.optional]
    )


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


def _accuracy(artifact: Content, *, rows: bool) -> str:
    score = artifact["accuracy"]
    if score is None:
        return "not measured"
    said = f"{score['metric']} {score['value']:.4f}"
    return f"{said} ({score['rows']} rows)" if rows else said


def _memory(name: str) -> Callable[[Content], str]:
    return lambda artifact: megabytes((artifact.get("memory") or {}).get(name))


def _ratio(entry: Content) -> str:
    found = entry["speedup"]
    if found is None:
        return "baseline"
    return show_ratio(Speedup(**{name: found[name] for name in ("ratio", "low", "high", "rounds")}))


def _energy(entry: Content) -> str:
    return _number((entry.get("energy") or {}).get("mj_per_inference"), digits=1)


def _time(name: str) -> Callable[[Content], str]:
    return lambda entry: _number(entry["latency"].get(name))


def _same(title: str, cell: Callable[[Content], str], *, optional: bool = False) -> Column:
    return Column(title=title, page=title, cell=cell, optional=optional)


def _wide(title: str, cell: Callable[[Content], str], *, optional: bool = False) -> Column:
    return Column(title=title, page=None, cell=cell, optional=optional)


_ARTIFACT = (
    _same("artifact", lambda each: each["name"]),
    _same("engine", lambda each: each["engine"]),
    _same("pattern", lambda each: each["pattern"] or "unknown"),
    Column(
        title="sparsity", page="zeros", cell=lambda each: "" if each["sparsity"] is None else f"{each['sparsity']:.1%}"
    ),
    Column(title="size MB", page="MB", cell=lambda each: megabytes(each["size_bytes"])),
    _same("plan MB", lambda each: megabytes(each.get("plan_bytes")), optional=True),
    _same("load ms", lambda each: f"{each['load_ms']:.0f}"),
    _same("host MB", _memory("host_peak"), optional=True),
    _same("GPU MB", _memory("device"), optional=True),
    _wide("accuracy", lambda each: _accuracy(each, rows=True)),
    Column(title=None, page="accuracy", cell=lambda each: _accuracy(each, rows=False)),
)
_LATENCY = (
    _same("workload", lambda entry: entry["workload"]),
    _same("artifact", lambda entry: entry["artifact"]),
    _same("first ms", _time("first"), optional=True),
    *(_same(f"{name} ms", _time(name)) for name in ("p50", "p90", "p99", "mean", "std")),
    _wide("rows/s", lambda entry: _number(entry["latency"]["throughput_per_s"], digits=1)),
    _wide("ms/token", lambda entry: _number(entry.get("per_token_ms")), optional=True),
    _wide("tokens/s", lambda entry: _number(entry.get("tokens_per_s"), digits=1), optional=True),
    _same("mJ", _energy, optional=True),
    _same("runs", lambda entry: str(entry["latency"]["runs"])),
    _wide("warm-up", lambda entry: str(entry["latency"]["warmup"])),
    _wide("ratio", _ratio),
)
