"""The reports of several comparisons as one table, in points: 100 times accuracy, F1, Matthews or Pearson correlation.

value       mean of the seeds ± their sample standard deviation
to dense    for each seed, value minus the dense run's; mean over the seeds ± its standard error
mean        for each seed, the mean over the data sets, of the seeds that have a value in all of them
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.reports import text_table
from pst.compare.grid import DENSE, percent
from pst.compare.report import LOWER_IS_BETTER
from pst.compare.statistics import Difference, Summary, paired, summarize
from pst.errors import ConfigError, RunError
from pst.markdown import markdown_table

SCHEMA_VERSION = 1
GOALS = {("unstructured", 0.5): 0.5, ("2:4", 0.5): 1.0, ("unstructured", 0.9): 5.0}
"""How many points below dense PST may be, as the mean over the data sets."""
GOAL_OF = "pst"
SAME = ("model", "methods", "patterns", "sparsities", "seeds", "from_dense", "teacher_from_dense")
HEADING = (
    "Points, mean of the seeds ± sample standard deviation, in brackets their number. The mean is over the data sets, "
    "seed by seed; differences to dense are taken seed by seed, ± the standard error of their mean."
)

Key = tuple[str, float, str]
"""Pattern, sparsity, method."""
Seeds = dict[int, float]


def build(
    reports: Mapping[str, dict[str, Any]], *, metrics: Mapping[str, str], environment: dict[str, Any]
) -> dict[str, Any]:
    """The JSON report. *reports*: each data set's report.json; *metrics*: in place of its headline metric.

    Raises ConfigError for a metric that the runs do not have or that is better when lower, RunError where there is no
    dense run to compare with.
    """
    unknown = [name for name in metrics if name not in reports]
    if unknown:
        raise ConfigError(f"--metric names {', '.join(unknown)}; the data sets are {', '.join(reports)}.")
    chosen = {name: metrics.get(name, report["metric"]) for name, report in reports.items()}
    points = {name: _points(name, report["cells"], chosen[name]) for name, report in reports.items()}
    keys = list(dict.fromkeys(_key(cell) for report in reports.values() for cell in report["cells"]))
    dense = next((key for key in keys if key[2] == DENSE), None)
    if dense is None:
        raise RunError(f"No comparison has the method {DENSE}, which the others are measured against.")
    shapes = list(dict.fromkeys(key[:2] for key in keys if key != dense))
    ordered = [dense, *sorted((key for key in keys if key != dense), key=lambda key: shapes.index(key[:2]))]
    means = {key: _means([points[name].get(key, {}) for name in reports]) for key in keys}
    rows = []
    for key in ordered:
        own: dict[str, Any] = {}
        for name, report in reports.items():
            cells = [cell for cell in report["cells"] if _key(cell) == key]
            own[name] = _entry(points[name].get(key, {}), points[name].get(dense, {}), is_dense=key == dense)
            own[name] |= {"failed": sum(cell["error"] is not None for cell in cells), **_cost(cells)}
        mean = _entry(means[key], means[dense], is_dense=key == dense)
        rows.append({"method": key[2], "pattern": key[0], "sparsity": key[1], "datasets": own, "mean": mean})
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": environment,
        "datasets": {
            name: {
                "metric": chosen[name],
                "options": report["options"],
                "environment": report["environment"],
                "notes": report["notes"],
                "cells": [_cell(cell) for cell in report["cells"]],
            }
            for name, report in reports.items()
        },
        "rows": rows,
        "verdicts": [_verdict(shape, {key[2]: means[key] for key in ordered if key[:2] == shape}) for shape in shapes],
        "goals": _goals(rows),
        "notes": _notes(reports),
    }


def _key(cell: dict[str, Any]) -> Key:
    return cell["pattern"], cell["sparsity"], cell["method"]


def _points(name: str, cells: Sequence[dict[str, Any]], metric: str) -> dict[Key, Seeds]:
    """Points by seed of each row that has any."""
    if metric in LOWER_IS_BETTER:
        raise ConfigError(f"{name}: {metric} is better when lower, which no mean in points can hold; use --metric.")
    found: dict[Key, Seeds] = {}
    for cell in cells:
        if cell["error"] is not None:
            continue
        if metric not in cell["metrics"]:
            raise ConfigError(f"{name}: the runs have no {metric}, but {', '.join(cell['metrics'])}; use --metric.")
        found.setdefault(_key(cell), {})[cell["seed"]] = 100 * cell["metrics"][metric]
    return found


def _means(every: Sequence[Seeds]) -> Seeds:
    """Of each seed that all have, the mean."""
    common = [seed for seed in every[0] if all(seed in one for one in every)]
    return {seed: math.fsum(one[seed] for one in every) / len(every) for seed in common}


def _entry(values: Seeds, dense: Seeds, *, is_dense: bool) -> dict[str, Any]:
    value, to_dense = summarize(list(values.values())), None if is_dense else paired(values, dense)
    return {
        "value": asdict(value) if value else None,
        "to_dense": asdict(to_dense) if to_dense else None,
        "by_seed": {str(seed): points for seed, points in values.items()},
    }


def _cost(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finished = [cell for cell in cells if cell["error"] is None]
    pace = summarize([_step_ms(cell) for cell in finished])
    most = {
        name: max((cell[name] or 0 for cell in finished), default=0) or None
        for name in ("peak_memory_bytes", "trainable_parameters")
    }
    return {"step_ms": pace.mean if pace else None, **most}


def _step_ms(cell: dict[str, Any]) -> float:
    return float(1e3 * cell["train_seconds"] / max(cell["steps"], 1))


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "method", "pattern", "sparsity", "seed", "error", "metrics", "measured_sparsity", "steps")
    kept = {name: cell[name] for name in (*names, "peak_memory_bytes", "trainable_parameters")}
    return kept | {"step_ms": _step_ms(cell) if cell["error"] is None else None}


def _average(seeds: Seeds) -> float:
    return math.fsum(seeds.values()) / len(seeds)


def _verdict(shape: tuple[str, float], means: Mapping[str, Seeds]) -> str:
    """Which method has the highest mean over the data sets, and by how much."""
    where = f"{shape[0]}, {percent(shape[1])}"
    ranked = sorted((method for method in means if means[method]), key=lambda method: -_average(means[method]))
    if not ranked:
        return f"{where}: no method has a seed with a value in every data set."
    text = f"{where}: {ranked[0]} is best with {_average(means[ranked[0]]):.2f}"
    if len(ranked) == 1:
        return f"{text}, the only one with a value."
    lead = paired(means[ranked[0]], means[ranked[1]])
    if lead is None:
        return f"{text}, but has no seed in common with {ranked[1]}, the next."
    text += f", {_signed(lead)} to {ranked[1]}, the next"
    if lead.error is None:
        return f"{text}; one seed shows no spread, so this can be noise."
    return f"{text} ({lead.n} seeds): {'more than' if lead.clear and lead.mean > 0 else 'within'} two standard errors."


def _goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each shape that has one: PST near to dense, and the best of the methods there, by the mean over the data."""
    goals = []
    for row in rows:
        shape = row["pattern"], row["sparsity"]
        if row["method"] != GOAL_OF or shape not in GOALS:
            continue
        limit, difference, value = GOALS[shape], row["mean"]["to_dense"], row["mean"]["value"]
        others = [other for other in rows if (other["pattern"], other["sparsity"]) == shape and other is not row]
        found = {other["method"]: other["mean"]["value"]["mean"] for other in others if other["mean"]["value"]}
        next_best = max(found, key=lambda method: found[method], default=None)
        near = None if difference is None else difference["mean"] >= -limit
        best = None if value is None or next_best is None else value["mean"] >= found[next_best]
        figure = "-" if difference is None else _signed(Difference(**difference))
        lead = "-" if best is None else f"{value['mean'] - found[next_best]:+.2f} to {next_best}"
        label = f"{GOAL_OF}, {_shape(row)}"
        base = {"pattern": shape[0], "sparsity": shape[1]}
        goals.append(base | {"limit": limit, "verdict": _met(near)})
        goals[-1]["text"] = f"{label}: {figure} to dense, at most {limit:g} below"
        goals.append(base | {"limit": None, "verdict": _met(best), "text": f"{label}: {lead}, best of all methods"})
    return goals


def _met(answer: bool | None) -> str:
    return "not measured" if answer is None else "met" if answer else "not met"


def _notes(reports: Mapping[str, dict[str, Any]]) -> list[str]:
    notes = []
    for option in SAME:
        values = {name: report["options"][option] for name, report in reports.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            notes.append(f"The comparisons differ in {option}: {', '.join(f'{k} {v}' for k, v in values.items())}.")
    every = [said for report in reports.values() for said in report["notes"] if not said.startswith("Failed: ")]
    common = [said for said in dict.fromkeys(every) if every.count(said) == len(reports) > 1]
    own = (f"{name}: {said}" for name, report in reports.items() for said in report["notes"] if said not in common)
    return [*notes, *common, *own]


def _signed(difference: Difference) -> str:
    error = "" if difference.error is None else f" ± {difference.error:.2f}"
    return f"{difference.mean:+.2f}{error}"


def _shape(row: dict[str, Any]) -> str:
    return "" if row["method"] == DENSE else f"{row['pattern']} {percent(row['sparsity'])}"


def _value(entry: dict[str, Any]) -> str:
    failed = entry.get("failed", 0)
    if entry["value"] is None:
        return "failed" if failed else "-"
    value = Summary(**entry["value"])
    spread = "" if value.std is None else f" ± {value.std:.2f}"
    return f"{value.mean:.2f}{spread} ({value.n}{f', {failed} failed' if failed else ''})"


def _difference(entry: dict[str, Any]) -> str:
    return "" if entry["to_dense"] is None else _signed(Difference(**entry["to_dense"]))


def tables(content: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of the values, and of the differences to dense."""
    titles = [f"{name} {one['metric']}" for name, one in content["datasets"].items()]
    values, differences = [], []
    for row in content["rows"]:
        entries = list(row["datasets"].values())
        mean = _value(row["mean"]) if row["mean"]["value"] else "failed" if any(e["failed"] for e in entries) else "-"
        first = [row["method"], _shape(row)]
        values.append([*first, *(_value(entry) for entry in entries), mean])
        if row["method"] != DENSE:
            differences.append([*first, *(_difference(entry) for entry in [*entries, row["mean"]])])
    return [
        (["method", "shape", *titles, "mean"], values),
        (["to dense", "shape", *content["datasets"], "mean"], differences),
    ]


def text(content: dict[str, Any]) -> str:
    """For a terminal."""
    parts = [text_table(*table, left=2) for table in tables(content)]
    said = [*(f"{goal['verdict']:<12} {goal['text']}" for goal in content["goals"]), *content["verdicts"]]
    return "\n\n".join([HEADING, *parts, "\n".join([*said, *content["notes"]])])


def markdown(content: dict[str, Any]) -> str:
    """The same as a page, with options and machines."""
    lines = ["# Accuracy of every method", "", HEADING, ""]
    for table in tables(content):
        lines += [*markdown_table(*table), ""]
    lines += [f"- {goal['verdict']}: {goal['text']}" for goal in content["goals"]]
    lines += [f"- {sentence}" for sentence in (*content["verdicts"], *content["notes"])]
    for name, one in content["datasets"].items():
        machine, options = one["environment"], one["options"]
        lines += ["", f"## {name}", "", f"- Command: `{machine['command']}`"]
        lines += [f"- {key}: {value}" for key, value in options.items() if value not in ([], False)]
        lines += [f"- Machine: {machine['cpu']}; {'; '.join(machine['gpus']) or 'no GPU'}; {machine['time']}"]
        lines += [f"- Versions: {', '.join(f'{key} {value}' for key, value in machine['versions'].items())}"]
    return "\n".join([*lines, ""])
