"""The comparison with other tools: what they print, what agrees, and a small real one."""

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from benchmarks import trtexec, trusted_tools
from benchmarks.trusted_tools import one_round, within
from benchmarks.trusted_tools_list import OURS, Block, Job, TrtExec, Worker, missing, tools
from benchmarks.trusted_tools_worker import feeds_of
from pst.errors import EngineError
from serve.bench.timing import Speedup
from serve.engines import open_engine

STAMP = "[11/26/2026-10:20:30]"
SUMMARY = f"""\
{STAMP} [I] Average on 10 runs - GPU latency: 1.9042 ms - Host latency: 2.0241 ms (enqueue 0.0161 ms)
{STAMP} [I]
{STAMP} [I] === Performance summary ===
{STAMP} [I] Throughput: 487.218 qps
{STAMP} [I] Latency: min = 1.99756 ms, max = 2.20312 ms, mean = 2.02512 ms, median = 2.02246 ms, \
percentile(90%) = 2.04004 ms, percentile(95%) = 2.05127 ms, percentile(99%) = 2.10254 ms
{STAMP} [I] Enqueue Time: min = 0.0126953 ms, max = 0.0639648 ms, mean = 0.0161133 ms, median = 0.0153809 ms, \
percentile(90%) = 0.0185547 ms, percentile(95%) = 0.0205078 ms, percentile(99%) = 0.0317383 ms
{STAMP} [I] H2D Latency: min = 0.0615234 ms, max = 0.098877 ms, mean = 0.0700684 ms, median = 0.0698242 ms, \
percentile(90%) = 0.0737305 ms, percentile(95%) = 0.0751953 ms, percentile(99%) = 0.0849609 ms
{STAMP} [I] GPU Compute Time: min = 1.88281 ms, max = 2.06543 ms, mean = 1.90503 ms, median = 1.9043 ms, \
percentile(90%) = 1.91602 ms, percentile(95%) = 1.92383 ms, percentile(99%) = 1.97559 ms
{STAMP} [I] D2H Latency: min = 0.0405273 ms, max = 0.0708008 ms, mean = 0.0500214 ms, median = 0.0498047 ms, \
percentile(90%) = 0.0537109 ms, percentile(95%) = 0.0551758 ms, percentile(99%) = 0.0634766 ms
{STAMP} [I] Total Host Walltime: 3.00482 s
{STAMP} [I] Total GPU Compute Time: 2.78896 s
{STAMP} [W] * GPU compute time is unstable, with coefficient of variance = 1.58526%.
{STAMP} [I] Explanations of the performance metrics are printed in the verbose logs.
"""
"""The form of TensorRT's documentation (Performance Benchmarking using trtexec) and of printPerformanceReport in
samples/common/sampleReporting.cpp of github.com/NVIDIA/TensorRT; the numbers are this test's."""


def test_the_documented_summary() -> None:
    found = trtexec.parse(SUMMARY)
    assert found["Latency"] == {"min": 1.99756, "max": 2.20312, "mean": 2.02512, "median": 2.02246}
    assert found["Enqueue Time"]["median"] == 0.0153809
    assert found["wall"]["median"] == pytest.approx(1000 / 487.218)
    parts = sum(found[name]["mean"] for name in ("H2D Latency", "GPU Compute Time", "D2H Latency"))
    assert found["Latency"]["mean"] == pytest.approx(parts, rel=1e-4)


def test_without_a_summary_its_last_words_are_told() -> None:
    with pytest.raises(ValueError, match="Error opening engine file: nowhere"):
        trtexec.parse("[I] Loading\n[E] Error opening engine file: nowhere\n\n")
    with pytest.raises(ValueError, match="it says nothing"):
        trtexec.parse("")


def program(folder: Path, text: str) -> Path:
    """A trtexec that notes what it was given, and prints *text*."""
    path = folder / "trtexec"
    path.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        f"pathlib.Path({str(folder / 'given.json')!r}).write_text(json.dumps(sys.argv[1:]))\nprint({text!r})\n",
        encoding="utf-8",
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("profile", [0, 2])
def test_trtexec_gets_the_plan_and_the_same_tokens(bert_artifact: Path, tmp_path: Path, profile: int) -> None:
    job = Job(artifact=bert_artifact, shape=(2, 8), engine="tensorrt", threads=1, folder=tmp_path)
    names = list(feeds_of(bert_artifact, job.shape))
    told = {"plan": "p.plan", "profile": profile, "types": dict.fromkeys(names, "int32")}  # as of TensorRT 8.6
    tool = TrtExec(program(tmp_path, SUMMARY), job, told)
    blocks = tool.measure(50)
    assert list(blocks) == list(tool.names)
    assert (blocks["trtexec latency"].p50, blocks["trtexec compute"].mean) == (2.02246, 1.90503)
    assert blocks["trtexec wall"].p50 == pytest.approx(1000 / 487.218)
    given = json.loads((tmp_path / "given.json").read_text(encoding="utf-8"))
    assert {"--loadEngine=p.plan", "--iterations=50", "--useCudaGraph", "--exposeDMA"} <= set(given)
    assert f"--shapes={','.join(f'{name}:2x8' for name in names)}" in given
    assert ("--useProfile=2" in given) == (profile == 2)
    for name, array in feeds_of(bert_artifact, job.shape).items():
        assert (np.fromfile(tmp_path / f"{name}.bin", np.int32).reshape(2, 8) == array).all()


def test_a_trtexec_that_fails(bert_artifact: Path, tmp_path: Path) -> None:
    job = Job(artifact=bert_artifact, shape=(1, 8), engine="tensorrt", threads=1, folder=tmp_path)
    told = {"plan": "p", "profile": 0, "types": dict.fromkeys(feeds_of(bert_artifact, (1, 8)), "int64")}
    with pytest.raises(EngineError, match="no performance summary: Cuda failure"):
        TrtExec(program(tmp_path, "Cuda failure"), job, told).measure(1)


class Fake:
    """A tool that says 2 ms, and fails when it is asked for the third time, where it is told to."""

    def __init__(self, name: str, *, fails: bool) -> None:
        self.names: Mapping[str, str] = {name: ""}
        self._name, self._left = name, 2 if fails else 100

    def alike(self, name: str) -> bool:
        return True

    def measure(self, count: int) -> dict[str, Block]:
        self._left -= 1
        if self._left < 0:
            raise EngineError("It went away.")
        return {self._name: Block(p50=2.0, mean=2.5, least=1.0 + self._left)}


def test_who_fails_in_a_round_is_left_out_of_it() -> None:
    options, failed = Namespace(turns=5, runs=1), dict[str, str]()
    found = one_round([Fake(OURS, fails=False), Fake("x", fails=True)], Random(0), options, failed)
    assert found == {OURS: Block(p50=2.0, mean=2.5, least=96.0)}
    assert failed == {"x": "It went away."}
    with pytest.raises(EngineError, match="went away"):
        one_round([Fake(OURS, fails=True)], Random(0), options, failed)


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [(0.96, 1.04, "yes"), (0.5, 0.94, "no"), (1.06, 1.2, "no"), (0.94, 1.04, "undecided"), (None, None, "undecided")],
)
def test_agreement(low: float | None, high: float | None, answer: str) -> None:
    assert within(Speedup(ratio=1.0, low=low, high=high, rounds=20)) == answer


def test_all_are_given_what_bench_gives(bert_artifact: Path) -> None:
    with open_engine(bert_artifact, threads=1) as engine:
        feeds = feeds_of(bert_artifact, (2, 8))
        assert set(feeds) == set(engine.inputs)
        assert engine.infer(feeds)["logits"].shape == (2, 2)
        assert feeds["attention_mask"].all()


def settings(artifact: Path, **more: Any) -> dict[str, Any]:
    return {
        "artifact": str(artifact), "model": str(artifact / "model.onnx"), "shape": [2, 8], "engine": "onnxruntime",
        "threads": 1, **more,
    }  # fmt: skip


def test_a_worker_that_cannot_start_says_why(bert_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="NoSuchFile"):
        Worker("x", "perf_test", settings(bert_artifact, model=str(tmp_path / "no.onnx")), times="", folder=tmp_path)


def test_a_worker_that_is_killed_says_by_what(bert_artifact: Path, tmp_path: Path) -> None:
    worker = Worker("x", "perf_test", settings(bert_artifact), times="", folder=tmp_path)
    worker._process.send_signal(signal.SIGSEGV)
    worker._process.wait()
    with pytest.raises(EngineError, match=r"\(signal 11 ended it\)"):
        worker._answer()
    worker.close()


def test_a_tool_that_fails_is_left_out(bert_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A polygraphy that does not load, as where its requirements are missing."""
    broken = tmp_path / "broken" / "polygraphy"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('not for this Python')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{broken.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("benchmarks.trusted_tools_list.has_polygraphy", lambda: True)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        job = Job(artifact=bert_artifact, shape=(2, 8), engine="onnxruntime", threads=1, folder=tmp_path)
        opened = tools(job, stack, failed, Random(0))
        assert {name for tool in opened for name in tool.names} == {OURS, "perf_test -Z", "perf_test"}
    assert failed == {"polygraphy --onnxrt": "ImportError: not for this Python"}


def test_a_small_real_comparison(bert_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(bert_artifact), "--shapes", "2x8", "--rounds", "2", "--turns", "2", "--runs", "2"]
    place = trusted_tools.main([*given, "--threads", "1", "--output", str(tmp_path)])
    report = json.loads(place.read_text(encoding="utf-8"))
    assert place.name.startswith("trusted_tools_onnxruntime_cpu_")
    absent = missing("onnxruntime")
    expected = ["perf_test -Z", "perf_test", *(["polygraphy --onnxrt"] if not absent else [])]
    assert sorted(row["tool"] for row in report["rows"]) == sorted(expected)
    for row in report["rows"]:
        ours, theirs = row["samples"]["ours"], row["samples"]["theirs"]
        assert len(ours) == len(theirs) == row["ratio"]["rounds"] == 2
        ratio = float(np.median(np.array(ours) / np.array(theirs)))
        assert row["ratio"]["ratio"] == pytest.approx(ratio)
        assert row["ours"]["least"] <= min(ours)
        assert row["theirs"]["p50"] == pytest.approx(np.median(theirs))
        assert row["within"] in ("yes", "no", "undecided")
    assert report["missing"] == absent
    assert not report["failed"]
    assert str(bert_artifact.parent) not in place.read_text(encoding="utf-8")
    assert "Session::Run of the same file" in capsys.readouterr().out


def test_language_models_are_refused(exported: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        trusted_tools.main([str(exported("gpt2")[1])])
    assert stopped.value.code == 2
    assert "language model with a cache" in capsys.readouterr().err
