"""report.html: one file without scripts or links, for a browser of any size, light and dark.

Made from the content of report.json, so that a page can be made of an old report as well.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from serve.bench.charts import COLORS, Bar, Dot, Interval, bars, dots, intervals
from serve.bench.receipt import Receipt
from serve.bench.receipt_text import layer_table, slowed_sentence
from serve.bench.report_tables import artifact_table, by_workload, latency_table

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --page: #fff; --card: #f7f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --line: #43484e; --page: #111113; --card: #1b1c1f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.verdict { border-left: 4px solid var(--line); padding: .1rem 0 .1rem .8rem; margin: .6rem 0; }
.soft, figcaption, th { color: var(--soft); font-size: .85rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: .5rem; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); }
svg .line { stroke: var(--line); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .2rem 0 .6rem; font-size: .9rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.why { white-space: normal; min-width: 16rem; }
td .part { display: inline-block; height: .7rem; border-radius: .15rem; background: #0072b2; vertical-align: middle; }
tr.zeros td:first-child { border-left: 4px solid #d55e00; }
tr.sparse td:first-child { border-left: 4px solid #009e73; }
tr.dense td:first-child { border-left: 4px solid var(--line); }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
"""

_LAYER_STYLES = {"density": "number", "ms": "number", "baseline ms": "number", "share": "share", "why": "why"}
"""Classes of a receipt's cells, by column."""


def page(report: Mapping[str, Any], *, machine: Sequence[tuple[str, str]]) -> str:
    """The whole page, for the content of a report.json and the lines that say where it was measured."""
    names = [artifact["name"] for artifact in report["artifacts"]]
    color = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    parts = ["<h1>Latency report</h1>"]
    parts += [f'<p class="verdict">{escape(sentence)}</p>' for sentence in report["verdicts"]]
    parts += ["<h2>Artifacts</h2>", _numbers(*artifact_table(report, page=True))]
    parts += ["<h2>Latency</h2>", _key(color), _latency(report, color), _numbers(*latency_table(report, page=True))]
    if len(names) > 1:
        parts += [f"<h2>Speed against {escape(names[0])}</h2>", _ratios(report, color)]
    parts += [f'<p class="soft">{escape(sentence)}</p>' for sentence in report.get("notes", ())]
    if any(artifact["accuracy"] for artifact in report["artifacts"]):
        parts += ["<h2>Accuracy and speed</h2>", _frontier(report, color)]
    if report.get("receipts"):
        parts += [
            "<h2>Receipt: where the sparsity of each layer went</h2>",
            *_receipts(report),
        ]
    parts += ["<h2>Method</h2>", f'<p class="soft">{escape(report["method"])}</p>', "<h2>Machine</h2>"]
    parts += [_table(["", ""], [[(label, ""), (value, "why")] for label, value in machine])]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Latency report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _key(color: Mapping[str, str]) -> str:
    items = "".join(f'<span><i style="background:{tint}"></i>{escape(name)}</span>' for name, tint in color.items())
    return f'<div class="key">{items}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _latency(report: Mapping[str, Any], color: Mapping[str, str]) -> str:
    found = [
        Bar(
            group=entry["workload"],
            label=entry["artifact"],
            color=color[entry["artifact"]],
            value=entry["latency"]["p50"],
            until=entry["latency"]["p99"],
        )
        for entry in by_workload(report)
    ]
    return _figure(bars(found, unit="ms"), "Bars end at the median, lines at the 99th percentile. Shorter is faster.")


def _ratios(report: Mapping[str, Any], color: Mapping[str, str]) -> str:
    found = [
        Interval(
            label=entry["workload"],
            color=color[entry["artifact"]],
            value=entry["speedup"]["ratio"],
            low=entry["speedup"]["low"],
            high=entry["speedup"]["high"],
        )
        for entry in by_workload(report)
        if entry["speedup"] is not None
    ]
    return _figure(
        intervals(found), "The baseline's time over the artifact's, with its interval. Right of 1 is faster."
    )


def _frontier(report: Mapping[str, Any], color: Mapping[str, str]) -> str:
    first = report["measurements"][0]["workload"]
    speed = {
        entry["artifact"]: entry["latency"]["p50"] for entry in report["measurements"] if entry["workload"] == first
    }
    known = [artifact for artifact in report["artifacts"] if artifact["accuracy"]]
    found = [
        Dot(label=each["name"], color=color[each["name"]], x=speed[each["name"]], y=each["accuracy"]["value"])
        for each in known
    ]
    metric = known[0]["accuracy"]["metric"]
    better = "Down" if metric == "perplexity" else "Up"
    return _figure(dots(found, x=f"p50 at {first}, ms", y=metric), f"{better} and to the left is better.")


def _numbers(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns whose title ends with a unit are set as numbers."""
    number = ["number" if title.endswith(("ms", "MB", "mJ", "runs", "zeros")) else "" for title in header]
    return _table(header, [list(zip(row, number, strict=True)) for row in rows])


def _receipts(report: Mapping[str, Any]) -> list[str]:
    """All of them, the first with zeros unfolded."""
    receipts = list(map(Receipt.from_json, report["receipts"]))
    median = {(each["artifact"], each["workload"]): each["latency"]["p50"] for each in report["measurements"]}
    first = next((each for each in receipts if any(layer.pattern != "dense" for layer in each.layers)), None)
    return [
        _receipt(each, inference_ms=median.get((each.artifact, each.workload)), unfolded=each is first)
        for each in receipts
    ]


def _receipt(receipt: Receipt, *, inference_ms: float | None, unfolded: bool) -> str:
    header, rows = layer_table(receipt)
    styles = [_LAYER_STYLES.get(title, "") for title in header]
    kinds = [
        "sparse" if layer.sparse_kernel else "zeros" if layer.pattern != "dense" else "dense"
        for layer in receipt.layers
    ]
    title = f"{receipt.artifact} at {receipt.workload}"
    said = f"{receipt.layers_ms:.2f} of {receipt.total_ms:.2f} ms are in layers that can be told apart"
    if receipt.limit is None:
        said += "; others are fused."
    elif receipt.is_slowed(inference_ms):
        said += "."
    else:
        said += f": without them the model would be {receipt.limit:.1f}× as fast, and no sparse kernel can do more."
    said = " ".join([said, *slowed_sentence(receipt, inference_ms)])
    table = _table(header, [list(zip(row, styles, strict=True)) for row in rows], kinds=kinds)
    start = "<details open>" if unfolded else "<details>"
    return f'{start}<summary>{escape(title)}</summary><p class="soft">{escape(said)}</p>{table}</details>'


def _table(head: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], *, kinds: Sequence[str] = ()) -> str:
    """Cells are a text and a class; the class share draws a bar of that many per cent."""
    made = ["".join(f"<th>{escape(title)}</th>" for title in head)]
    for index, row in enumerate(rows):
        cells = "".join(_cell(text, kind) for text, kind in row)
        made.append(f'<tr class="{kinds[index]}">{cells}</tr>' if kinds else f"<tr>{cells}</tr>")
    first, *rest = made
    top = f"<thead><tr>{first}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(rest)}</tbody></table></div>'


def _cell(text: str, kind: str) -> str:
    if kind == "share":
        return f'<td class="number">{escape(text)} <span class="part" style="width:{text[:-1]}px"></span></td>'
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"
