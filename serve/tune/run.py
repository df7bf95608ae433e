"""``bench --tune``: open what there is to choose from, search, measure the finalists anew, choose, write tuned.json."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pst.errors import ConfigError
from pst.files import atomic_folder, refuse_existing
from pst.progress import progress
from serve.bench.environment import environment
from serve.bench.gpu import busy_note, open_gpu, others_busy
from serve.bench.openings import call_of
from serve.bench.runner import all_generate, describe_subject, workloads_of
from serve.bench.stopping import PRECISION, Stopped, StopRule
from serve.bench.timing import Latency, Speedup, measure_in_turn, percentile
from serve.bench.workload import Shape, Workload, check_shapes
from serve.engines import Engine, Shapes, available_cpus
from serve.tune.candidates import Candidate, candidates, open_candidates
from serve.tune.overall import combine
from serve.tune.reasons import Reason, reasons
from serve.tune.search import Choice, Search, choose, compare_shared, search
from serve.tune.tuned import OVERALL, Decision, Row, Tuned
from serve.tune.words import advice, why

SEARCH_SHARE = 0.5
"""Of the budget: the rest is the finalists'."""


@dataclass(frozen=True, kw_only=True)
class Final:
    """Finalists of one workload, measured anew."""

    latencies: Mapping[str, Latency]
    stopped: Stopped

    def compare(self, first: str, second: str) -> Speedup:
        """The first's time over the second's."""
        return compare_shared({name: each.samples for name, each in self.latencies.items()}, first, second)


def tune(
    paths: Sequence[Path],
    *,
    shapes: Sequence[Shape],
    output: Path,
    engine: str = "auto",
    counts: Mapping[Shape, float] | None = None,
    threads: int = 0,
    warmup: int = 10,
    runs: int = 100,
    precision: float = PRECISION,
    budget_s: float = 120.0,
    new_tokens: int = 32,
    spanned: bool = False,
    receipt: bool = True,
    command: str = "",
    overwrite: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """Choose among *paths*, a dense model and sparse versions of it, in each engine of *engine* (names with commas).

    *shapes*: batch x sequence. *counts*: how often each comes; None for the geometric mean over all workloads.
    *runs*: most rounds of the search and least of the finalists; *precision* and *budget_s* as in
    serve.bench.runner.bench, *budget_s* for search and finalists together. *receipt*: profile what has zeros.
    *clock*: seconds; what the engines' time is told by.
    Writes tuned.json to the folder *output*.

    Raises ConfigError where nothing can be chosen among (no dense model, several models), EngineError where no dense
    one opens, RunError where *output* is in the way, and what describe raises.
    """
    if warmup < 1 or runs < 1 or budget_s <= 0 or new_tokens < 1 or not 0 <= precision < 1:
        raise ConfigError(
            "Give --warmup, --runs and --new-tokens 1 or more, --budget above 0 and --precision from 0 to below 1."
        )
    refuse_existing(output, overwrite=overwrite, reads=paths)
    threads = threads or available_cpus()
    found = candidates(paths, engine=engine)
    machine = environment(command=command, threads=threads)
    gpu = open_gpu()
    machine["gpu_busy_before"] = others_busy(gpu)
    with contextlib.ExitStack() as stack:
        # With all others as well, as pst serve will open it: what is measured is what is served.
        planned = Shapes(fixed=tuple(shapes), others=True, new_tokens=new_tokens, spanned=spanned)
        engines, left_out = open_candidates(found, stack, threads=threads, shapes=planned)
        opened = [each for each in found if each.name in engines]
        new_tokens = new_tokens if all_generate(engines) else 0
        check_shapes(shapes, {name: each.max_length for name, each in engines.items()}, new_tokens=new_tokens)
        by_name = {each.artifact: each.path for each in opened}
        folders = {name: describe_subject(path) for name, path in by_name.items()}
        workloads = workloads_of(shapes, by_name, folders, None, new_tokens=new_tokens)
        rule = _Rule(warmup=warmup, runs=runs, precision=precision, clock=clock)
        searches = _search(opened, engines, workloads, rule, budget_s=budget_s * SEARCH_SHARE)
        budget_s -= sum(each.seconds for each in searches)
        finals = _measure(opened, engines, workloads, searches, rule, budget_s=max(0.0, budget_s))
        told = reasons(opened, engines, workloads, profile=receipt)
        layers = {name: each for name, one in engines.items() if (each := getattr(one, "layer_times", None))}
    machine["gpu_busy_after"] = others_busy(gpu)
    busy = busy_note(machine["gpu_busy_before"], machine["gpu_busy_after"])
    times = None
    if counts is not None:
        reference = _reference(opened)
        # Of a language model the prompt and the tokens after it come equally often.
        times = [
            counts[each.batch, each.sequence or 0] * percentile(final.latencies[reference].samples, 50)
            for each, final in zip(workloads, finals, strict=True)
        ]
    parts = [
        _decide(opened, each, one, final, told, count=(counts or {}).get((each.batch, each.sequence or 0)))
        for each, one, final in zip(workloads, searches, finals, strict=True)
    ]
    whole = _decide_overall(opened, searches, finals, workloads, told, times)
    tuned = Tuned(
        environment=machine, folder=output.absolute(), threads=threads, spanned=spanned, candidates=tuple(opened),
        left_out=tuple(left_out), layers=layers, by="geometric mean" if times is None else "traffic",
        workloads=tuple(parts), overall=whole,
        advice=(*advice([*parts, whole], told, opened), *filter(None, [busy])),
    )  # fmt: skip
    with atomic_folder(output, overwrite=overwrite) as folder:
        tuned.write(folder)
    return tuned


@dataclass(frozen=True, kw_only=True)
class _Rule:
    warmup: int
    runs: int
    precision: float
    clock: Callable[[], float]


def _reference(opened: Sequence[Candidate]) -> str:
    return next(each.name for each in opened if each.is_dense)


def _dense(opened: Sequence[Candidate]) -> set[str]:
    return {each.name for each in opened if each.is_dense}


def _search(
    opened: Sequence[Candidate],
    engines: Mapping[str, Engine],
    workloads: Sequence[Workload],
    rule: _Rule,
    *,
    budget_s: float,
) -> list[Search]:
    found = []
    with progress("search", len(workloads)) as advance:
        for index, workload in enumerate(workloads):
            found.append(
                search(
                    {each.name: call_of(engines[each.name], workload) for each in opened},
                    dense=_dense(opened),
                    batch=workload.batch,
                    warmup=rule.warmup,
                    runs=rule.runs,
                    budget_s=budget_s / (len(workloads) - index),
                    clock=rule.clock,
                )
            )
            budget_s = max(0.0, budget_s - found[-1].seconds)
            advance(1, workload.name)
    return found


def _measure(
    opened: Sequence[Candidate],
    engines: Mapping[str, Engine],
    workloads: Sequence[Workload],
    searches: Sequence[Search],
    rule: _Rule,
    *,
    budget_s: float,
) -> list[Final]:
    dense, reference, finals = _dense(opened), _reference(opened), []
    everywhere = _promising(opened, searches)
    with progress("measure finalists", len(workloads)) as advance:
        for index, (workload, found) in enumerate(zip(workloads, searches, strict=True)):
            here = [found.fastest(dense), reference, found.fastest({each.name for each in opened} - dense)]
            names = list(dict.fromkeys(name for name in (*here, *everywhere) if name is not None))
            stop = StopRule(runs=rule.runs, precision=rule.precision, budget_s=budget_s / (len(workloads) - index))
            timing = measure_in_turn(
                {name: call_of(engines[name], workload) for name in names},
                batch=workload.batch,
                warmup=rule.warmup,
                rule=stop,
                clock=rule.clock,
            )
            budget_s = max(0.0, budget_s - timing.seconds)
            stopped = stop.stopped(timing.samples, seconds=timing.seconds)
            finals.append(Final(latencies=timing.latencies, stopped=stopped))
            advance(1, workload.name)
    return finals


def _promising(opened: Sequence[Candidate], searches: Sequence[Search]) -> list[str]:
    """The dense candidate that is fastest over all workloads, and the other one that is, if it may be faster."""
    reference, dense = _reference(opened), _dense(opened)

    def mean(name: str) -> float:
        return combine([each.compare(reference, name) for each in searches], None).ratio

    best = max(dense, key=mean)
    others = [each.name for each in opened if each.name not in dense]
    other = max(others, key=mean, default=None)
    return [best, *([other] if other is not None and mean(other) > mean(best) else [])]


def _decide(
    opened: Sequence[Candidate],
    workload: Workload,
    found: Search,
    final: Final,
    told: Mapping[tuple[str, str], Reason],
    *,
    count: float | None,
) -> Decision:
    dense = _dense(opened)
    choice = choose(list(final.latencies), dense=dense, reference=_reference(opened), compare=final.compare)
    rows = []
    for each in opened:
        last = final.latencies.get(each.name)
        compare = final.compare if last is not None else found.compare
        speedup = None if each.name == choice.dense else compare(choice.dense, each.name)
        reason = told.get((each.name, workload.name))
        rows.append(
            Row(
                candidate=each.name,
                speedup=speedup,
                latency=last or Latency(samples=found.samples[each.name], batch=workload.batch, warmup=0),
                measured="search" if last is None else "final",
                why=why(each, choice, speedup, in_final=last is not None),
                zeros=_zeros(each, choice, reason),
            )
        )
    return Decision(
        workload=workload.name,
        chosen=_by_name(opened, choice.chosen),
        dense=_by_name(opened, choice.dense),
        rows=tuple(rows),
        batch=workload.batch,
        sequence=workload.sequence,
        new_tokens=workload.new_tokens,
        count=count,
        note=final.stopped.sentence(workload.name),
    )


def _decide_overall(
    opened: Sequence[Candidate],
    searches: Sequence[Search],
    finals: Sequence[Final],
    workloads: Sequence[Workload],
    told: Mapping[tuple[str, str], Reason],
    times: Sequence[float] | None,
) -> Decision:
    in_all = [name for name in finals[0].latencies if all(name in each.latencies for each in finals)]

    def mean(compares: Sequence[Callable[[str, str], Speedup]]) -> Callable[[str, str], Speedup]:
        return lambda first, second: combine([compare(first, second) for compare in compares], times)

    def slower_at(before: str, after: str) -> list[str]:
        pairs = zip(workloads, finals, strict=True)
        return [each.name for each, final in pairs if final.compare(before, after).finding == "slower"]

    last = mean([final.compare for final in finals])
    choice = choose(
        in_all, dense=_dense(opened), reference=_reference(opened), compare=last,
        is_allowed=lambda before, after: not slower_at(before, after),
    )  # fmt: skip
    rows = []
    for each in opened:
        in_final = each.name in in_all
        compare = last if in_final else mean([found.compare for found in searches])
        speedup = None if each.name == choice.dense else compare(choice.dense, each.name)
        slower = slower_at(choice.dense, each.name) if in_final else []
        reason = next((told[each.name, one.name] for one in workloads if (each.name, one.name) in told), None)
        rows.append(
            Row(
                candidate=each.name,
                speedup=speedup,
                latency=None,
                measured="final" if in_final else "search",
                why=why(each, choice, speedup, in_final=in_final, slower_at=slower),
                zeros=_zeros(each, choice, reason),
            )
        )
    return Decision(
        workload=OVERALL,
        chosen=_by_name(opened, choice.chosen),
        dense=_by_name(opened, choice.dense),
        rows=tuple(rows),
    )


def _zeros(candidate: Candidate, choice: Choice, reason: Reason | None) -> str:
    return reason.why if reason is not None and candidate.name != choice.chosen else ""


def _by_name(opened: Sequence[Candidate], name: str) -> Candidate:
    return next(each for each in opened if each.name == name)
