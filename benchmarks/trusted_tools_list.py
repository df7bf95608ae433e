"""The tools that benchmarks/trusted_tools.py asks: which there are for an engine, and what each one's time is of."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import IO, Any, Protocol

from benchmarks import trtexec
from benchmarks.trusted_tools_worker import feeds_of
from pst.errors import EngineError

OURS = "pst bench"
POLYGRAPHY = "polygraphy"
INSTALL_POLYGRAPHY = "run: pip install polygraphy"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What everybody runs."""

    artifact: Path
    shape: tuple[int, int]
    """Batch x tokens."""
    engine: str
    threads: int
    folder: Path
    """For files that the tools need."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Milliseconds of a few inferences in a row."""

    p50: float
    mean: float
    least: float


class Tool(Protocol):
    """Something that times."""

    names: Mapping[str, str]
    """Of its times, and what each is of."""

    def alike(self, name: str) -> bool:
        """Whether that is of the same as ours."""
        ...

    def measure(self, count: int) -> dict[str, Block]:
        """*count* inferences, by name. Raises EngineError."""
        ...


class Worker:
    """A process of benchmarks/trusted_tools_worker.py."""

    def __init__(
        self, name: str, way: str, settings: Mapping[str, Any], *, times: str, folder: Path, alike: bool = True
    ) -> None:
        """Returns once it has loaded the model. Raises EngineError, in its own last words."""
        self.names: Mapping[str, str] = {name: times}
        self._alike = alike
        self._said = (folder / f"{name.replace(' ', '_')}.log").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.trusted_tools_worker", way, json.dumps(settings)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
        )
        try:
            self.told: dict[str, Any] = self._answer()
        except EngineError:
            self.close()
            raise

    def alike(self, name: str) -> bool:
        """See Tool."""
        return self._alike

    def measure(self, count: int) -> dict[str, Block]:
        """See Tool."""
        _pipe(self._process.stdin).write(f"{count}\n")
        _pipe(self._process.stdin).flush()
        times = self._answer()
        return {name: Block(p50=median(times), mean=fmean(times), least=min(times)) for name in self.names}

    def _answer(self) -> Any:
        line = _pipe(self._process.stdout).readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            last = [each for each in self._said.read().splitlines() if each.strip()]
            said, code = last[-1] if last else "it said nothing", self._process.returncode
            raise EngineError(f"{said} (signal {-code} ended it)" if code < 0 else said)
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        _pipe(self._process.stdin).close()
        self._process.wait()
        _pipe(self._process.stdout).close()
        self._said.close()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "the process was started with pipes"
    return stream


class TrtExec:
    """One trtexec for each round, since it does not stay open."""

    def __init__(self, program: Path, job: Job, told: Mapping[str, Any]) -> None:
        """*told*: of our TensorRT engine's worker."""
        self.names: Mapping[str, str] = {
            "trtexec latency": "events on the GPU: copies in, kernels, copies out; without what the host adds to that, "
            "which our wall-clock time has: filling pinned memory, launching, waiting",
            "trtexec wall": "wall-clock time of one inference after the other, copies included; ours also has numpy's "
            "copies to and from pinned memory",
            "trtexec compute": "kernels alone",
        }
        self._program, self._plan, self._profile = program, Path(told["plan"]), int(told["profile"])
        feeds = feeds_of(job.artifact, job.shape)
        self._feeds = {name: array.astype(told["types"][name]) for name, array in feeds.items()}
        self._folder = job.folder

    def alike(self, name: str) -> bool:
        """See Tool."""
        return name != "trtexec compute"

    def measure(self, count: int) -> dict[str, Block]:
        """See Tool."""
        try:
            said = trtexec.measure(
                self._program, self._plan, self._feeds, profile=self._profile, runs=count, folder=self._folder
            )
        except (OSError, ValueError) as error:
            raise EngineError(str(error)) from error
        metrics = {"trtexec latency": "Latency", "trtexec wall": "wall", "trtexec compute": "GPU Compute Time"}
        return {
            name: Block(p50=said[metric]["median"], mean=said[metric]["mean"], least=said[metric]["min"])
            for name, metric in metrics.items()
        }


def has_polygraphy() -> bool:
    """Whether it is installed; whether it loads, shows in the process that wants it."""
    return importlib.util.find_spec(POLYGRAPHY) is not None


def missing(engine: str) -> dict[str, str]:
    """What is not installed of what *engine* is compared with, and how to install it."""
    absent = {} if has_polygraphy() else {POLYGRAPHY: INSTALL_POLYGRAPHY}
    if engine == "tensorrt" and trtexec.find() is None:
        absent[trtexec.NAME] = trtexec.INSTALL
    return absent


def tools(job: Job, stack: ExitStack, failed: dict[str, str], order: Random) -> list[Tool]:
    """Ours, and all that are installed and start; *failed* gets the others' words. Raises EngineError of ours.

    They start in a drawn *order*, lest the place in it counts; but nobody runs a plan before our engine built it.
    *stack* closes them.
    """
    settings: dict[str, Any] = {
        "artifact": str(job.artifact), "model": str(job.artifact / "model.onnx"), "shape": job.shape,
        "engine": job.engine, "threads": job.threads,
    }  # fmt: skip
    ours = _Way(name=OURS, way="ours", times="")
    opened: list[Tool] = []
    if job.engine == "tensorrt":
        worker = ours.start(settings, job.folder, stack)
        opened.append(worker)
        program = trtexec.find()
        if program is not None:
            opened.append(TrtExec(program, job, worker.told))
        settings |= worker.told | {"engine": job.engine}
    ways = [*([] if opened else [ours]), *_others(job)]
    for each in order.sample(ways, len(ways)):
        try:
            opened.append(each.start(settings, job.folder, stack))
        except EngineError as error:
            if each is ours:
                raise
            failed[each.name] = str(error)
    return opened


@dataclass(frozen=True, kw_only=True)
class _Way:
    """A worker that can be started."""

    name: str
    way: str
    times: str
    alike: bool = True
    more: Mapping[str, Any] = field(default_factory=dict)

    def start(self, settings: Mapping[str, Any], folder: Path, stack: ExitStack) -> Worker:
        """Closed by *stack*."""
        worker = Worker(
            self.name, self.way, {**settings, **self.more}, times=self.times, folder=folder, alike=self.alike
        )
        stack.callback(worker.close)
        return worker


def _others(job: Job) -> list[_Way]:
    """What is compared with the engine of *job*, but for trtexec."""
    perf, onnxrt, trt = "perf_test", "polygraphy_onnxrt", "polygraphy_trt"
    if job.engine == "tensorrt":
        times = "wall-clock time with copies, but kernels launched one by one, where ours are a CUDA graph"
        found = [_Way(name="polygraphy --trt", way=trt, times=times, alike=False)]
    elif job.engine == "onnxruntime-cuda":
        model = {"model": str(_fused(job)), "stop_spinning": True}
        host = (
            "the graph as our engine fuses it, arrays of the host, kernels launched one by one; ours are a CUDA graph"
        )
        bound = "the graph as our engine fuses it, as a CUDA graph, inputs and outputs left on the GPU; ours are copied"
        found = [
            _Way(name="perf_test", way=perf, times=host, alike=False, more=model),
            _Way(name="perf_test -g", way=perf, times=bound, more=model | {"bound": True}),
            _Way(name="polygraphy --onnxrt", way=onnxrt, times=host, alike=False, more=model),
        ]
    else:
        same = "Session::Run of the same file with the same options"
        spin = "the same, but that threads spin between two runs, where ours stop"
        found = [
            _Way(name="perf_test -Z", way=perf, times=same, more={"stop_spinning": True}),
            _Way(name="perf_test", way=perf, times=f"{spin}; this is its default"),
            _Way(
                name="polygraphy --onnxrt", way=onnxrt, times=f"{spin}; a thread for each CPU that its process may use"
            ),
        ]
    return [each for each in found if has_polygraphy() or not each.name.startswith(POLYGRAPHY)]


def _fused(job: Job) -> Path:
    """What our ONNX Runtime CUDA engine runs for texts without padding, as serve/engines/_onnxruntime_cuda.py says."""
    from serve.engines._onnxruntime_cuda import fused, takes_padding

    file = job.folder / "fused.onnx"
    if file.is_file():
        return file
    model = fused(job.artifact / "model.onnx", unpadded=True)
    if takes_padding(model):
        model = fused(job.artifact / "model.onnx", unpadded=False)
    if model is None:
        return job.artifact / "model.onnx"
    file.write_bytes(model.content)
    return file
