"""The report of a measurement: report.json (versioned), report.md, and a table for the terminal."""

import dataclasses
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst.files import write_json
from pst.markdown import markdown_table
from serve.bench.gpu import Energy, busy_note
from serve.bench.html import page
from serve.bench.memory import Memory
from serve.bench.receipt import Receipt
from serve.bench.receipt_text import receipt_table, summary
from serve.bench.report_tables import (
    artifact_table,
    latency_table,
    machine_lines,
    megabytes,
    show_ratio,
)
from serve.bench.stopping import Stopped
from serve.bench.timing import EQUAL_WITHIN, Latency, Speedup
from serve.engines._sparse_layout import ENOUGH
from serve.layers import LayerTimes, describe_choices

SCHEMA_VERSION = 2
"""2 added why each workload ended, first inferences, memory, energy and the size of plans; 1 can still be compared."""
METHOD = (
    "All artifacts were measured in turn in one process: each round times every artifact once, every second round "
    "backwards, and with several artifacts one inference of the same artifact that is not timed goes before. The time "
    "is wall-clock around one inference, inputs and outputs in host memory, tokenization left out; the first inference "
    "at each shape and the loading stand apart. Percentiles interpolate linearly between the closest ranks (numpy's "
    "default). "
    "The ratio is the baseline's time over the artifact's within a round, and the "
    "median of the rounds is given with its 95% interval from order statistics, widened where rounds that follow each "
    "other are alike; above 1 is faster than the baseline. A shape goes on until its intervals are narrow enough. "
    "Where all were opened several times, each opening's ratio is the median of its rounds', and counts as one round. "
    f"Ratios within {EQUAL_WITHIN:.0%} of 1 count as the same speed."
)
GENERATION = (
    " A prompt is one inference with an empty key/value cache, up to the scores of the first new token. New tokens are "
    "one inference each, after a prompt that was read before the clock started; the cache goes through host memory. "
    "Each reads the likeliest token of the one before, and none ends the text."
)
"""What is added where language models were measured."""
MEMORY = (
    " Host memory is what the process grew by while an artifact was loaded and made its first inferences, at the peak; "
    "all are in one process, so that the first one's also holds the runtime's libraries, and what one gives back "
    "another may use unseen."
)
DEVICE = (
    " GPU memory is what the whole GPU's use grew by in the meantime. Energy (mJ) is that of the whole GPU, idle power "
    "included, for what the times are of, as a mean: from one step of the driver's counter to another, over a second "
    "or more of them in a row."
)
"""What is added where a GPU was read."""
SPARSE_FROM = 0.05
"""Share of zeros from which a model counts as sparse though it names no pattern."""
ZEROS = (
    "ONNX Runtime's {device} kernels multiply zeros like any other number, so zeros in place save no time; "
    "they pay on a runtime with kernels for their pattern"
)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A headline metric on a data set."""

    metric: str
    value: float
    rows: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One artifact as measured."""

    name: str
    path: str
    engine: str
    pattern: str | None
    """None where the artifact does not say."""
    sparsity: float | None
    """Share of zeros in the pruned weights, 0 to 1; of pattern structured, of what was removed."""
    size_bytes: int
    load_ms: float
    accuracy: Accuracy | None
    plan_bytes: int | None = None
    """What the runtime made of the file and keeps for the next time; None where it keeps nothing."""
    memory: Memory | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is said, or was counted, to hold zeros to speak of."""
        if self.pattern == "structured":  # what was removed is no zero
            return False
        return self.pattern not in (None, "dense") or (self.sparsity or 0.0) >= SPARSE_FROM


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One artifact on one workload; speedup is None for the baseline itself."""

    workload: str
    batch: int
    sequence: int | None
    subject: str
    latency: Latency
    speedup: Speedup | None
    new_tokens: int = 0
    """Tokens of each row that the latency is the time of; 0 where it is that of one inference."""
    energy: Energy | None = None
    """None on the CPU, or where the GPU does not tell."""

    @property
    def per_token_ms(self) -> float | None:
        """Median milliseconds from one new token of a row to the next."""
        return self.latency.p50 / self.new_tokens if self.new_tokens else None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens of all rows together in a second."""
        return self.latency.throughput * self.new_tokens if self.new_tokens else None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that bench found. The first subject is the baseline."""

    environment: dict[str, Any]
    subjects: tuple[Subject, ...]
    measurements: tuple[Measurement, ...]
    receipts: tuple[Receipt, ...] = ()
    """Of each artifact and shape whose layers the engine could tell apart."""
    stopped: Mapping[str, Stopped] = field(default_factory=dict)
    """By workload: why its measurement ended."""
    process_peak_bytes: int | None = None
    """The most memory of the host that this process had while any artifact was loaded or warmed up."""
    layers: Mapping[str, Sequence[Sequence[LayerTimes]]] = field(default_factory=dict)
    """By subject whose engine chose which layers run sparse: at each opening, the times of these layers."""
    unmeasured: tuple[str, ...] = ()
    """What Ctrl-C left out: workloads, the accuracy, the receipts."""

    def of(self, subject: str) -> list[Measurement]:
        """One artifact's measurements, in the workloads' order."""
        return [entry for entry in self.measurements if entry.subject == subject]

    @property
    def method(self) -> str:
        """What was timed, and how."""
        said = METHOD + (GENERATION if any(entry.new_tokens for entry in self.measurements) else "")
        memories = [subject.memory for subject in self.subjects if subject.memory is not None]
        said += MEMORY if any(memory.host_peak is not None for memory in memories) else ""
        return said + (DEVICE if any(memory.device is not None for memory in memories) else "")

    def verdicts(self) -> list[str]:
        """One sentence for every artifact but the baseline."""
        baseline = self.subjects[0].name
        return [verdict(subject, self.of(subject.name), baseline=baseline) for subject in self.subjects[1:]]

    def notes(self) -> list[str]:
        """How well each workload is known; which layers were chosen; the memory of all; who else used the GPU."""
        said = [why.sentence(workload) for workload, why in self.stopped.items()]
        said += [describe_choices(name, openings) for name, openings in self.layers.items()]
        if self.process_peak_bytes is not None:
            said.append(f"All artifacts together took {megabytes(self.process_peak_bytes)} MB of host memory at most.")
        if self.unmeasured:
            said.append(f"Interrupted before {', '.join(self.unmeasured)}.")
        busy = busy_note(*(self.environment.get(f"gpu_busy_{when}") for when in ("before", "after")))
        return [*said, *([] if busy is None else [busy])]

    def _inference_ms(self, receipt: Receipt) -> float | None:
        """The median latency of what *receipt* is of."""
        found = (each for each in self.of(receipt.artifact) if each.workload == receipt.workload)
        return next((each.latency.p50 for each in found), None)

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "method": self.method,
            "baseline": self.subjects[0].name,
            "artifacts": [dataclasses.asdict(subject) for subject in self.subjects],
            "measurements": [
                {
                    "artifact": entry.subject,
                    "workload": entry.workload,
                    "batch": entry.batch,
                    "sequence": entry.sequence,
                    "latency": entry.latency.to_json(),
                    "speedup": None if entry.speedup is None else entry.speedup.to_json(),
                    "new_tokens": entry.new_tokens,
                    "per_token_ms": entry.per_token_ms,
                    "tokens_per_s": entry.tokens_per_s,
                    "energy": None if entry.energy is None else entry.energy.to_json(),
                }
                for entry in self.measurements
            ],
            "stopped": {workload: why.to_json() for workload, why in self.stopped.items()},
            "process_peak_bytes": self.process_peak_bytes,
            "unmeasured": list(self.unmeasured),
            "notes": self.notes(),
            "verdicts": self.verdicts(),
            "receipts": [receipt.to_json(inference_ms=self._inference_ms(receipt)) for receipt in self.receipts],
        }

    def write(self, folder: Path) -> None:
        """Write report.json, report.md and report.html into an existing folder."""
        write_json(folder / "report.json", self.to_json())
        (folder / "report.html").write_text(
            page(self.to_json(), machine=machine_lines(self.environment)), encoding="utf-8"
        )
        (folder / "report.md").write_text(self.to_markdown(), encoding="utf-8")

    def to_markdown(self) -> str:
        """report.md: verdicts, two tables, the method and the machine."""
        content, lines = self.to_json(), ["# Latency report", ""]
        lines += [line for sentence in self.verdicts() for line in (sentence, "")]
        lines += ["## Artifacts", "", *markdown_table(*artifact_table(content)), ""]
        lines += ["## Latency", "", *markdown_table(*latency_table(content)), ""]
        lines += [*(f"- {sentence}" for sentence in self.notes()), "", self.method, ""]
        for receipt in self.receipts:
            said = summary(receipt, inference_ms=self._inference_ms(receipt))
            lines += [f"## Receipt of {receipt.artifact} at {receipt.workload}", "", said, ""]
            lines += [*markdown_table(*receipt_table(receipt)), ""]
        lines += ["## Machine", "", *(f"- {name}: {value}" for name, value in machine_lines(self.environment)), ""]
        return "\n".join(lines)

    def render(self) -> str:
        """Tables for a terminal, as wide as it is; colour only where stdout is one."""
        from rich.console import Console
        from rich.table import Table

        stream = io.StringIO()
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size((140, 24)).columns if terminal else 160
        console = Console(file=stream, width=width, force_terminal=terminal, highlight=False)
        last = self.receipts[-1:] if self.subjects[-1].pattern != "dense" else ()
        content = self.to_json()
        for header, rows in (artifact_table(content), latency_table(content), *map(receipt_table, last)):
            table = Table()
            for index, title in enumerate(header):
                table.add_column(title, justify="left" if index < 2 else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
        said = [
            f"The receipt above is that of {each.artifact} at {each.workload}. "
            f"{summary(each, inference_ms=self._inference_ms(each))}"
            for each in last
        ]
        for sentence in (*said, *self.notes(), *self.verdicts()):
            console.print(sentence, markup=False, soft_wrap=not terminal)
        return stream.getvalue().rstrip("\n")


def verdict(subject: Subject, measurements: list[Measurement], *, baseline: str) -> str:
    """What the intervals allow to say about one artifact, workload by workload."""
    by_finding: dict[str, list[str]] = {}
    for entry in measurements:
        assert entry.speedup is not None, "the baseline has no verdict"
        by_finding.setdefault(entry.speedup.finding, []).append(f"{entry.workload} ({show_ratio(entry.speedup)})")
    wording = {
        "faster": "faster than",
        "same": "not faster and not slower than",
        "slower": "slower than",
        "undecided": "not clearly faster or slower than",
    }
    parts = [
        f"{wording[finding]} {baseline} at {', '.join(by_finding[finding])}"
        for finding in wording
        if finding in by_finding
    ]
    text = f"{subject.name} is {'; '.join(parts)}"
    multiplied = subject.engine.startswith("onnxruntime") and not subject.engine.endswith("-sparse")
    if set(by_finding) - {"faster"} and subject.is_sparse and multiplied:
        text += f": {ZEROS.format(device='CUDA' if subject.engine.endswith('cuda') else 'CPU')}"
        text += f", as those of --engine onnxruntime-sparse are {ENOUGH}" if subject.engine.endswith("cpu") else ""
    text += "."
    if "undecided" in by_finding:
        text += (
            " Where it is not clear, the interval is too wide for a verdict: measure more rounds on a quieter machine."
        )
    return text
