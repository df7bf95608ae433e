"""The metric against sparsity: one line a method with error bars, dense as a band; plot.png and plot.svg.

Patterns whose sparsity is chosen get a panel each; those that fix it (N:M) share one, as points. matplotlib is imported
on first use; without it the report says so.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pst.compare.grid import DENSE, percent
from pst.compare.report import PLOT_FILES, Report
from pst.compare.results import Row
from pst.files import atomic_file, remove
from pst.patterns import parse_pattern

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
"""Told apart in every common form of colour blindness (Okabe and Ito, "Color Universal Design", 2008)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
GREY = "#555555"


def draw(report: Report, folder: Path) -> Report:
    """Write the plots into *folder*; the report with their names, or with a note that says why there are none."""
    for name in PLOT_FILES:
        remove(folder / name)
    if not _panels(report):
        return _without(report, "No plot: there is no sparse run to show.")
    if importlib.util.find_spec("matplotlib") is None:
        return _without(
            report,
            "No plot: matplotlib is not installed. Install it and give the same command again; finished runs are kept.",
        )
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pst", "font.size": 10}):
        figure = make_figure(report)
        for name in PLOT_FILES:
            metadata = {"Date": None} if name.endswith("svg") else None
            with atomic_file(folder / name) as partial:
                figure.savefig(partial, format=name.rpartition(".")[2], dpi=150, metadata=metadata)
    return dataclasses.replace(report, plots=PLOT_FILES)


def _without(report: Report, note: str) -> Report:
    return dataclasses.replace(report, notes=(*report.notes, note))


def _panels(report: Report) -> dict[str, list[Row]]:
    """Rows by the title of their panel, those without a value left out."""
    panels: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.method != DENSE and row.value is not None:
            title = row.pattern if parse_pattern(row.pattern).sparsity is None else "N:M"
            panels.setdefault(title, []).append(row)
    return dict(sorted(panels.items(), key=lambda item: item[0] == "N:M"))


def make_figure(report: Report) -> Any:
    """A matplotlib Figure; no window, no global state."""
    from matplotlib.figure import Figure

    panels = _panels(report)
    methods = list(dict.fromkeys(row.method for row in report.rows if row.method != DENSE))
    figure = Figure(figsize=(max(5.5, 4.2 * len(panels)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        axis.set_title(title)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        _dense_band(axis, report, handles)
        _curves(axis, rows, methods, handles, points=title == "N:M")
    better = "" if report.higher_is_better else ", lower is better"
    axes[0].set_ylabel(f"{report.metric}{better}")
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title="mean ± standard deviation over the seeds",
    )
    return figure


def _dense_band(axis: Any, report: Report, handles: dict[str, Any]) -> None:
    for row in report.rows:
        if row.method == DENSE and row.value is not None:
            handles[DENSE] = axis.axhline(row.value.mean, color=GREY, linestyle="--", linewidth=1.2)
            if row.value.std:
                low, high = row.value.mean - row.value.std, row.value.mean + row.value.std
                axis.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0)


def _curves(axis: Any, rows: Sequence[Row], methods: Sequence[str], handles: dict[str, Any], *, points: bool) -> None:
    """Methods stand a little beside each other, so that no error bar hides another."""
    keys = list(dict.fromkeys(row.pattern for row in rows)) if points else sorted({row.sparsity for row in rows})
    places: dict[Any, float] = {key: float(i) if points else float(key) for i, key in enumerate(keys)}  # type: ignore[arg-type]
    span = max(places.values()) - min(places.values()) or (1.0 if points else 0.1)
    gap = min(0.12, 0.8 / len(methods)) if points else 0.015 * span
    for index, method in enumerate(methods):
        shown = sorted((places[row.pattern if points else row.sparsity], row) for row in rows if row.method == method)
        if not shown:
            continue
        offset = gap * (index - (len(methods) - 1) / 2)
        line = axis.errorbar(
            [place + offset for place, _ in shown],
            [row.value.mean if row.value else 0.0 for _, row in shown],
            yerr=[(row.value.std if row.value else None) or 0.0 for _, row in shown],
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none" if points else "-",
            markersize=6,
            linewidth=1.5,
            capsize=3,
        )
        handles.setdefault(method, line)
    margin = max(0.5 if points else 0.1 * span, gap * (len(methods) + 1) / 2)
    axis.set_xlim(min(places.values()) - margin, max(places.values()) + margin)
    sparsity = {row.pattern: row.sparsity for row in rows}
    labels = [f"{key}\n{percent(sparsity[str(key)])}" if points else percent(float(key)) for key in keys]
    axis.set_xticks(list(places.values()), labels)
    axis.set_xlabel("pattern, its sparsity" if points else "sparsity")
