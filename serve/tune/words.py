"""The result of a tuning for people: why each candidate was chosen or not, as sentences and as a table."""

import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence

from serve.bench.report_tables import known_columns, show_ratio
from serve.bench.timing import Speedup
from serve.layers import describe_layers
from serve.tune.candidates import Candidate
from serve.tune.reasons import Reason
from serve.tune.search import Choice
from serve.tune.tuned import OVERALL, Decision, Row, Tuned, decisions

BUT = ", but not the fastest"
FINDINGS = {
    "slower": "slower than dense",
    "same": "no faster than dense",
    "undecided": "not clearly faster than dense",
    "faster": f"faster than dense{BUT}",
}


def why(
    candidate: Candidate, choice: Choice, speedup: Speedup | None, *, in_final: bool, slower_at: Sequence[str] = ()
) -> str:
    """Why it was chosen, or not. *speedup*: over the kept dense one; *slower_at*: where it is slower than that."""
    if candidate.name == choice.chosen:
        return "chosen: dense is kept" if candidate.is_dense else "chosen"
    if speedup is None:
        return "the dense one that the choice beats"
    text = FINDINGS[speedup.finding]
    if not in_final and speedup.finding != "slower":
        return f"{text.removesuffix(BUT)}; another looked faster in the search"
    if slower_at and speedup.finding != "slower":
        return f"slower than dense at {', '.join(slower_at)}; on the whole {text.removesuffix(BUT)}"
    return text


def advice(
    parts: Sequence[Decision], told: Mapping[tuple[str, str], Reason], opened: Sequence[Candidate]
) -> Iterator[str]:
    """Of each choice with zeros that no sparse kernel used: the dense model can have what makes it faster as well."""
    dense = {(each.engine, each.linear_form, each.precision) for each in opened if each.is_dense}
    for name in dict.fromkeys(each.chosen.name for each in parts if each.chosen.has_zeros):
        chosen = next(each for each in opened if each.name == name)
        ran = [reason.sparse_kernels for (candidate, _), reason in told.items() if candidate == name]
        if not any(each is None or each for each in ran):
            form = " ".join(word for word in (chosen.precision, chosen.linear_form) if word)
            said = f"No sparse kernel ran in {name}, so that its zeros are not what makes it faster"
            if (chosen.engine, chosen.linear_form, chosen.precision) in dense:
                yield f"{said}; measure again on a quieter machine."
            else:
                yield f"{said}; export the dense model in the same form ({form}) and tune again."


def verdict(decision: Decision) -> str:
    """One sentence: what to use, how much faster it is, or that dense is kept."""
    where = "Over all workloads" if decision.workload == OVERALL else f"At {decision.workload}"
    if decision.chosen.is_dense:
        return f"{where} dense is kept: {decision.chosen.name}. Nothing is clearly faster."
    assert decision.speedup is not None
    return (
        f"{where} {decision.chosen.name} is chosen: {show_ratio(decision.speedup)} as fast as {decision.dense.name}, "
        "the fastest dense one."
    )


def render(tuned: Tuned) -> str:
    """Table and sentences for a terminal."""
    from rich.console import Console
    from rich.table import Table

    stream, terminal = io.StringIO(), sys.stdout.isatty()
    width = shutil.get_terminal_size((140, 24)).columns if terminal else 160
    console = Console(file=stream, width=width, force_terminal=terminal, highlight=False)
    header, rows = table(tuned)
    grid = Table()
    for index, title in enumerate(header):
        grid.add_column(
            title, justify="right" if title in RIGHT else "left", overflow="fold" if index == 1 else "ellipsis"
        )
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
    for sentence in sentences(tuned):
        console.print(sentence, markup=False, soft_wrap=not terminal)
    return stream.getvalue().rstrip("\n")


RIGHT = ("accuracy", "p50 ms", "rounds")


def table(tuned: Tuned) -> tuple[list[str], list[list[str]]]:
    """One row for each candidate at each workload, the choice first."""
    header = [
        "workload",
        "candidate",
        "pattern",
        "precision",
        "form",
        "accuracy",
        "p50 ms",
        "ratio to dense",
        "rounds",
        "outcome",
    ]
    by_name = {each.name: each for each in tuned.candidates}
    rows = []
    for decision in decisions(tuned):
        chosen = decision.chosen.name
        for row in sorted(decision.rows, key=lambda row: (row.candidate != chosen, -_ratio(row))):
            rows.append([decision.workload, *_cells(by_name[row.candidate], row)])
    return known_columns(header, rows, optional=("form", "accuracy"))


def _ratio(row: Row) -> float:
    return 1.0 if row.speedup is None else row.speedup.ratio


def _cells(candidate: Candidate, row: Row) -> list[str]:
    return [
        candidate.name,
        candidate.pattern,
        candidate.precision,
        candidate.linear_form,
        "" if candidate.accuracy is None else f"{candidate.accuracy:.4f}",
        "" if row.latency is None else f"{row.latency.p50:.3f}",
        "1, by definition" if row.speedup is None else show_ratio(row.speedup),
        "" if row.latency is None else str(len(row.latency.samples)),
        row.why,
    ]


def sentences(tuned: Tuned) -> list[str]:
    """What was chosen, why zeros saved nothing, which layers run sparse, who was left out, how to serve the choice."""
    said = [each.note for each in tuned.workloads]
    zeros: dict[str, list[str]] = {}
    for row in (row for decision in tuned.workloads for row in decision.rows if row.zeros):
        zeros.setdefault(row.zeros, []).append(row.candidate)
    said += [f"{', '.join(dict.fromkeys(names))}: {reason}." for reason, names in zeros.items()]
    said += [f"Layers of {name}: {describe_layers(layers)}." for name, layers in tuned.layers.items()]
    missing: dict[tuple[str, str], list[str]] = {}
    for each in tuned.left_out:
        missing.setdefault((each.engine, each.why), []).append(each.artifact)
    said += [f"Left out: {', '.join(names)} on {engine}. {reason}" for (engine, reason), names in missing.items()]
    said += tuned.advice
    said += [verdict(each) for each in decisions(tuned)]
    said.append(f"Serve it: {tuned.command}")
    return said
