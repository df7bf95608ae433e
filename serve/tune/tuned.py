"""tuned.json: what was chosen for each workload and for all of them, what lost and why, and on what machine.

``serve`` takes such a file in place of an artifact, and runs the choice for all workloads (serve/tune/serving.py).
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst.files import write_json
from serve.bench.timing import EQUAL_WITHIN, Latency, Speedup
from serve.layers import LayerTimes
from serve.tune.candidates import Candidate, LeftOut
from serve.tune.overall import Mean

SCHEMA_VERSION = 2
TUNED_NAME = "tuned.json"
OVERALL = "overall"
METHOD = (
    "All candidates were timed in turn in one process, as pst bench does it; what was clearly slower than the fastest "
    "so far dropped out. The fastest of the dense ones and of the others were then measured anew, and the choice rests "
    "on these samples alone. What is not dense is chosen where it is faster than every dense one measured with it: the "
    f"ratio's 95% interval lies above {1 + EQUAL_WITHIN:.2f}. Over all workloads it must not be slower at any of them "
    "either. Else dense is kept."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate at one workload, or over all of them."""

    candidate: str
    speedup: Speedup | None
    """The kept dense candidate's time over this one's; None for that one itself."""
    latency: Latency | None
    """None over all workloads."""
    measured: str
    """final: with samples that chose nothing before; search: with those until it was out."""
    why: str
    """Why it was chosen, or was not; no full stop."""
    zeros: str = ""
    """Why its zeros saved no time; no full stop."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "candidate": self.candidate,
            "speedup": None if self.speedup is None else self.speedup.to_json(),
            "latency": None if self.latency is None else self.latency.to_json(),
            "measured": self.measured,
            "why": self.why,
            "zeros": self.zeros,
        }


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was chosen for one workload, or for all."""

    workload: str
    """Its name, or OVERALL."""
    chosen: Candidate
    dense: Candidate
    """The fastest dense candidate, or the reference where none is clearly faster than that."""
    rows: tuple[Row, ...]
    batch: int | None = None
    sequence: int | None = None
    new_tokens: int = 0
    count: float | None = None
    """How often it comes, of traffic."""
    note: str = ""
    """How the final measurement ended."""

    @property
    def speedup(self) -> Speedup | None:
        """The choice's ratio to dense; None where dense is kept."""
        return next(row.speedup for row in self.rows if row.candidate == self.chosen.name)

    def to_json(self, *, threads: int) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "workload": self.workload,
            "batch": self.batch,
            "sequence": self.sequence,
            "new_tokens": self.new_tokens,
            "count": self.count,
            "chosen": self.chosen.name,
            "dense": self.dense.name,
            "keeps_dense": self.chosen.is_dense,
            "artifact": str(self.chosen.path.resolve()),
            "fingerprint": self.chosen.fingerprint,
            "engine": self.chosen.engine,
            "threads": threads,
            "speedup": None if self.speedup is None else self.speedup.to_json(),
            "note": self.note,
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Everything that tuning found."""

    environment: dict[str, Any]
    folder: Path
    """Where tuned.json is to lie, from the root on, as the artifacts in it are named."""
    threads: int
    spanned: bool
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...]
    layers: Mapping[str, Sequence[LayerTimes]]
    """By candidate: the layers that its engine timed, to choose which run sparse; only of those that did."""
    by: Mean
    """How the workloads count together."""
    workloads: tuple[Decision, ...]
    overall: Decision
    advice: tuple[str, ...] = ()
    """Sentences on what the choice may rest on besides zeros, and what to try."""

    @property
    def command(self) -> str:
        """The command line that serves the choice for all workloads as it was tuned, wherever it is called."""
        return shlex.join(["pst", "serve", str(self.folder)])

    def to_json(self) -> dict[str, Any]:
        """The content of tuned.json."""
        rows = [
            {
                **asdict(each),
                "path": str(each.path.resolve()),
                "layers": [layer.to_json() for layer in self.layers.get(each.name, ())],
            }
            for each in self.candidates
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "method": METHOD,
            "spanned": self.spanned,
            "candidates": rows,
            "left_out": [asdict(each) for each in self.left_out],
            "by": self.by,
            "workloads": [self._decision(each) for each in self.workloads],
            OVERALL: {**self._decision(self.overall), "command": self.command},
            "advice": list(self.advice),
        }

    def _decision(self, decision: Decision) -> dict[str, Any]:
        layers = self.layers.get(decision.chosen.name, ())
        sparse = [name for layer in layers if layer.is_sparse for name in layer.weights]
        return {**decision.to_json(threads=self.threads), "faster_sparse": sparse if layers else None}

    def write(self, folder: Path) -> None:
        """Write tuned.json into an existing folder."""
        write_json(folder / TUNED_NAME, self.to_json())


def decisions(tuned: Tuned) -> Sequence[Decision]:
    """Those for each workload, and last that for all."""
    return (*tuned.workloads, tuned.overall) if len(tuned.workloads) > 1 else tuned.workloads
