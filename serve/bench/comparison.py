"""Two reports of pst bench, side by side: what became faster between two machines, versions or revisions.

The two were not measured in turn, so that a ratio is that of two medians, each known within an interval of its own.
With each at (1 + CONFIDENCE) / 2, the interval of the ratio, from the least to the greatest that they allow, holds with
CONFIDENCE at least (Bonferroni). What else differs, load above all, no interval knows: hence the list of differences.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst.errors import ConfigError, RunError
from pst.files import read_json
from pst.markdown import markdown_table
from serve.bench.report import SCHEMA_VERSION
from serve.bench.report_tables import show_ratio
from serve.bench.timing import CONFIDENCE, Speedup, median_interval, percentile

COMPARED = ("cpu", "cpus_usable", "memory_gib", "os", "gpus", "threads")
"""Fields of a report's environment that change its numbers; versions are compared one by one."""
_REMEDY = "give the report.json that pst bench wrote, or the folder that holds it."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact on one workload in both reports."""

    artifact: str
    workload: str
    first_ms: float
    """Median of the first report."""
    second_ms: float
    speedup: Speedup
    """The first's time over the second's: above 1 the second is faster."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two reports have in common, and what not."""

    first: str
    second: str
    rows: tuple[Row, ...]
    differences: tuple[str, ...]
    """Of the machines and versions: ``threads: 2, then 4``."""
    alone: tuple[str, ...]
    """Artifacts and workloads that one of them has by itself."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        rows = [{**asdict(row), "speedup": row.speedup.to_json()} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def render(self) -> str:
        """A table in Markdown, which a terminal shows as well, and the caveats."""
        header = ["workload", "artifact", "first ms", "second ms", "ratio", "finding"]
        body = [
            [
                row.workload,
                row.artifact,
                f"{row.first_ms:.3f}",
                f"{row.second_ms:.3f}",
                show_ratio(row.speedup),
                f"second {row.speedup.finding}",
            ]
            for row in self.rows
        ]
        lines = [f"First: {self.first}", f"Second: {self.second}", "", *markdown_table(header, body), ""]
        lines += [
            "Above 1 the second is faster. Both were measured by themselves, so that another load of the machine looks "
            "like a difference; measure in turn, with both artifacts in one pst bench, where that is possible."
        ]
        lines += [f"Differs: {each}" for each in self.differences] or ["Machine and versions are the same."]
        lines += [f"Only in one of them: {each}" for each in self.alone]
        return "\n".join(lines)


def compare_reports(first: Path, second: Path) -> Comparison:
    """Compare two report.json, or the folders that hold them.

    Raises RunError for what is not such a report, ConfigError where nothing was measured in both.
    """
    one, other = _load(first), _load(second)
    mine, theirs = _samples(one), _samples(other)
    rows = tuple(
        Row(
            artifact=key[0],
            workload=key[1],
            first_ms=percentile(mine[key], 50),
            second_ms=percentile(theirs[key], 50),
            speedup=_speedup(mine[key], theirs[key]),
        )
        for key in mine
        if key in theirs
    )
    if not rows:
        raise ConfigError(
            f"{first} and {second} have no artifact and shape in common; measure artifacts of the same names at the "
            "same --shapes."
        )
    alone = [
        f"{artifact} at {workload} ({where})"
        for found, rest, where in ((mine, theirs, "first"), (theirs, mine, "second"))
        for artifact, workload in found
        if (artifact, workload) not in rest
    ]
    return Comparison(
        first=str(first),
        second=str(second),
        rows=rows,
        differences=tuple(differences(one["environment"], other["environment"])),
        alone=tuple(alone),
    )


def _load(path: Path) -> dict[str, Any]:
    file = path / "report.json" if path.is_dir() else path
    report: dict[str, Any] = read_json(file, RunError, _REMEDY)
    version = report.get("schema_version")
    if not isinstance(version, int) or "measurements" not in report:
        raise RunError(f"{file} is not a report of pst bench; {_REMEDY}")
    if version > SCHEMA_VERSION:
        raise RunError(f"{file} has schema version {version}, this program reads up to {SCHEMA_VERSION}; update it.")
    return report


def _samples(report: Mapping[str, Any]) -> dict[tuple[str, str], list[float]]:
    return {(each["artifact"], each["workload"]): each["latency"]["samples"] for each in report["measurements"]}


def _speedup(first: list[float], second: list[float]) -> Speedup:
    each = (1 + CONFIDENCE) / 2
    one, other = median_interval(first, confidence=each), median_interval(second, confidence=each)
    known = one is not None and other is not None
    return Speedup(
        ratio=percentile(first, 50) / percentile(second, 50),
        low=one[0] / other[1] if one is not None and other is not None else None,
        high=one[1] / other[0] if one is not None and other is not None else None,
        rounds=min(len(first), len(second)) if known else 0,
    )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What changes numbers, and is not the same in two of serve.bench.environment: ``threads: 2, then 4``."""
    pairs = [(name, one.get(name), other.get(name)) for name in COMPARED]
    before, after = one.get("versions", {}), other.get("versions", {})
    pairs += [(name, before.get(name), after.get(name)) for name in sorted({*before, *after})]
    return [f"{name}: {_said(mine)}, then {_said(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def _said(value: Any) -> str:
    return "none" if value in (None, [], "") else ", ".join(value) if isinstance(value, list) else str(value)
