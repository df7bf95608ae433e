"""Timing artifacts that are opened once, or several times to learn how sessions of one file differ, and its results."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pst.progress import progress
from serve.bench.gpu import Energy, Gpu, measure_energy
from serve.bench.report import Measurement
from serve.bench.stopping import Stopped, StopRule, relative_half_width
from serve.bench.timing import Speedup, Timing, compare_openings, compare_samples, measure_in_turn
from serve.bench.workload import Workload
from serve.decoding import Decoding, empty_cache, open_cache
from serve.engines import Engine
from serve.layers import LayerTimes

LEAST_OPENINGS = 6
"""The fewest whose least and greatest ratio enclose the median with 95% confidence, see median_interval."""


@contextlib.contextmanager
def unwatched(name: str) -> Iterator[None]:
    """In place of MemoryWatch.of, where memory was watched before."""
    yield


@dataclass(kw_only=True)
class Opening:
    """The measurement of engines that were opened once."""

    label: str
    warmup: int
    runs: int
    precision: float
    timings: list[Timing] = field(default_factory=list)
    """Of each workload; of fewer, where Ctrl-C ended it."""
    stopped: list[Stopped] = field(default_factory=list)
    energy: list[dict[str, Energy | None]] = field(default_factory=list)
    layers: dict[str, tuple[LayerTimes, ...]] = field(default_factory=dict)
    """By artifact, the layers that its engine timed when it was opened, to choose which run sparse."""

    @property
    def seconds(self) -> float:
        """Of timed rounds."""
        return sum(timing.seconds for timing in self.timings)

    def measure(
        self,
        engines: Mapping[str, Engine],
        workloads: Sequence[Workload],
        watch: Callable[[str], contextlib.AbstractContextManager[None]],
        gpu: Gpu | None,
        *,
        budget_s: float,
    ) -> None:
        """All *workloads* in turn; *gpu* is asked for the energy, where there is one.

        KeyboardInterrupt drops what it hits, and ends the measurement; before the first is measured, it is raised.
        """
        self.layers = {name: each for name, engine in engines.items() if (each := getattr(engine, "layer_times", ()))}
        for index, workload in enumerate(workloads):
            try:
                self._measure(engines, workload, watch, gpu, budget_s=budget_s / (len(workloads) - index))
            except KeyboardInterrupt:
                if not index:
                    raise
                for kept in (self.timings, self.stopped, self.energy):
                    del kept[index:]
                return
            budget_s = max(0.0, budget_s - self.timings[-1].seconds)

    def _measure(
        self,
        engines: Mapping[str, Engine],
        workload: Workload,
        watch: Callable[[str], contextlib.AbstractContextManager[None]],
        gpu: Gpu | None,
        *,
        budget_s: float,
    ) -> None:
        calls = {}
        for name, engine in engines.items():
            with watch(name):
                calls[name] = call_of(engine, workload)
        rule = StopRule(runs=self.runs, precision=self.precision, budget_s=budget_s)
        with progress(f"measure {workload.name}{self.label}", self.runs) as advance:
            timing = measure_in_turn(
                calls,
                batch=workload.batch,
                warmup=self.warmup,
                rule=rule,
                on_round=_limited(advance, self.runs),
                around_warmup=watch,
            )
        self.stopped.append(rule.stopped(timing.samples, seconds=timing.seconds))
        self.timings.append(timing)
        on_gpu = [] if gpu is None else [name for name, engine in engines.items() if "cpu" not in engine.name]
        self.energy.append({name: measure_energy(gpu, calls[name]) for name in on_gpu if gpu is not None})


def together(
    taken: Sequence[Opening], workloads: Sequence[Workload]
) -> tuple[tuple[Measurement, ...], dict[str, Stopped]]:
    """What all openings found, by artifact and workload."""
    measurements: list[Measurement] = []
    stopped: dict[str, Stopped] = {}
    for index, workload in enumerate(workloads):
        timings = [one.timings[index] for one in taken]
        baseline = next(iter(timings[0].samples))
        speedups: list[Speedup] = []
        for name, first in timings[0].latencies.items():
            speedup = None
            if name != baseline:
                pairs = [(timing.samples[baseline], timing.samples[name]) for timing in timings]
                speedup = compare_samples(*pairs[0]) if len(taken) == 1 else compare_openings(*zip(*pairs, strict=True))
                speedups.append(speedup)
            measurements.append(
                Measurement(
                    workload=workload.name,
                    batch=workload.batch,
                    sequence=workload.sequence,
                    subject=name,
                    latency=replace(first, samples=tuple(time for timing in timings for time in timing.samples[name])),
                    speedup=speedup,
                    new_tokens=workload.new_tokens,
                    energy=taken[-1].energy[index].get(name),
                )
            )
        stopped[workload.name] = _stopped([one.stopped[index] for one in taken], speedups)
    return tuple(measurements), stopped


def _stopped(all_of: Sequence[Stopped], speedups: Sequence[Speedup]) -> Stopped:
    last = all_of[-1]
    if len(all_of) == 1:
        return last
    widths = [width for each in speedups if (width := relative_half_width(each)) is not None]
    return replace(
        last,
        reason="budget" if any(each.reason == "budget" for each in all_of) else last.reason,
        rounds=sum(each.rounds for each in all_of),
        seconds=sum(each.seconds for each in all_of),
        half_width=max(widths, default=None),
        openings=len(all_of),
    )


def _limited(advance: Callable[[], None], runs: int) -> Callable[[], None]:
    """Shows the first *runs* rounds; how many more there will be, nobody knows before."""
    left = iter(range(runs))

    def on_round() -> None:
        if next(left, None) is not None:
            advance()

    return on_round


def call_of(engine: Engine, workload: Workload) -> Callable[[int], object]:
    """Inputs are chosen before the clock starts, once per distinct input."""
    if workload.new_tokens:
        return _continue(engine, workload)
    feeds = [workload.feeds_of(index, engine.inputs) for index in range(len(workload.feeds))]
    past = empty_cache(engine.inputs, workload.batch)
    if past:  # the scores of what follows the prompt, with the cache left where it is
        prompt = {name: array for name, array in feeds[0].items() if name not in past}
        return lambda index: open_cache(engine, past).extend(prompt)
    return lambda index: engine.infer(feeds[index % len(feeds)])


def _continue(engine: Engine, workload: Workload) -> Callable[[int], object]:
    """The likeliest tokens after a prompt that is read here, whether or not one of them ends a text."""
    prompt = Decoding(engine, pad_id=0)
    first = prompt.join(workload.feeds[0]["input_ids"].tolist()).argmax(axis=-1)

    def call(index: int) -> None:
        decoding, tokens = prompt.copy(), first
        for _ in range(workload.new_tokens):
            tokens = decoding.step(tokens).argmax(axis=-1)

    return call
