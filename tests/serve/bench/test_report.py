"""The report: verdicts from synthetic timings, and the files of a real measurement."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.data import DataSpec
from pst.errors import ArtifactError, ConfigError, RunError
from serve.bench.gpu import Energy
from serve.bench.html import page
from serve.bench.memory import Memory
from serve.bench.report import Measurement, Report, Subject, verdict
from serve.bench.runner import bench, unique_names
from serve.bench.stopping import LEAST_ROUNDS
from serve.bench.timing import Latency, compare_samples

ZEROS = "ONNX Runtime's CPU kernels multiply zeros like any other number"
SPARSE = Subject(
    name="sparse", path="sparse", engine="onnxruntime-cpu", pattern="2:4", sparsity=0.5, size_bytes=1, load_ms=1.0,
    accuracy=None,
)  # fmt: skip


def measured(ratio: float, *, workload: str = "1x32", noise: float = 0.005, rounds: int = 100) -> Measurement:
    random = np.random.default_rng(3)
    base = 10 * np.exp(noise * random.standard_normal(rounds))
    other = 10 / ratio * np.exp(noise * random.standard_normal(rounds))
    latency = Latency(samples=tuple(other.tolist()), batch=1, warmup=1)
    speedup = compare_samples(base.tolist(), latency.samples)
    return Measurement(workload=workload, batch=1, sequence=32, subject="sparse", latency=latency, speedup=speedup)


def test_faster() -> None:
    text = verdict(SPARSE, [measured(1.5)], baseline="dense")
    assert text.startswith("sparse is faster than dense at 1x32 (1.50×, ")
    assert "zeros" not in text
    assert "not" not in text


def test_not_faster_says_why() -> None:
    text = verdict(SPARSE, [measured(1.0)], baseline="dense")
    assert text.startswith("sparse is not faster and not slower than dense at 1x32 (1.00×")
    assert ZEROS in text


def test_slower() -> None:
    text = verdict(SPARSE, [measured(0.8)], baseline="dense")
    assert text.startswith("sparse is slower than dense at 1x32 (0.80×")
    assert ZEROS in text


@pytest.mark.parametrize(("noise", "rounds"), [(0.5, 40), (0.0, 5)])
def test_undecided(noise: float, rounds: int) -> None:
    text = verdict(SPARSE, [measured(1.0, noise=noise, rounds=rounds)], baseline="dense")
    assert text.startswith("sparse is not clearly faster or slower than dense")
    assert "measure more rounds" in text
    assert ("too few rounds" in text) == (rounds == 5)


def test_each_workload_has_its_own_finding() -> None:
    entries = [measured(1.5), measured(1.0, workload="8x128"), measured(1.6, workload="2x2")]
    text = verdict(SPARSE, entries, baseline="dense")
    assert "faster than dense at 1x32 (1.50×" in text
    assert "2x2 (1.60×" in text
    assert "not faster and not slower than dense at 8x128" in text


@pytest.mark.parametrize(
    "change", [{"pattern": "dense", "sparsity": 0.01}, {"pattern": None, "sparsity": None}, {"engine": "torch-cpu"}]
)
def test_the_reason_is_given_only_where_it_applies(change: dict[str, Any]) -> None:
    subject = dataclasses.replace(SPARSE, **change)
    assert "multiply zeros" not in verdict(subject, [measured(1.0)], baseline="dense")


@pytest.fixture(scope="module")
def measurement(
    bert_artifact: Path, sparse_artifact: Path, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    """A real measurement with data, on the smallest scale."""
    output = tmp_path_factory.mktemp("bench") / "report"
    report = bench(
        [bert_artifact, sparse_artifact], shapes=[(1, 8), (4, 16)], output=output, threads=1, warmup=2, runs=12,
        precision=0, data=DataSpec(data=str(reviews_file)), command="pst bench a b",
    )  # fmt: skip
    return report, output


def test_other_programs_on_the_gpu_are_told(measurement: tuple[Report, Path]) -> None:
    report, _ = measurement
    assert not any("Other programs" in sentence for sentence in report.notes())
    machine = report.environment | {"gpu_busy_before": 0, "gpu_busy_after": 62}
    assert "busy for 62% of the time" in dataclasses.replace(report, environment=machine).notes()[-1]


def test_report_json(measurement: tuple[Report, Path]) -> None:
    report, output = measurement
    content = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(report.to_json()))
    assert content["schema_version"] == 2
    assert content["baseline"] == "bert"
    assert [(entry["name"], entry["pattern"]) for entry in content["artifacts"]] == [
        ("bert", "dense"),
        ("bert-2of4", "2:4"),
    ]
    assert content["artifacts"][1]["sparsity"] == pytest.approx(0.5)
    for entry in content["artifacts"]:
        assert entry["size_bytes"] == (Path(entry["path"]) / "model.onnx").stat().st_size
        assert entry["accuracy"]["metric"] == "accuracy"
        assert entry["accuracy"]["rows"] == 64
        assert entry["load_ms"] > 0
        assert entry["plan_bytes"] is None
        assert set(entry["memory"]) == {"host_loaded", "host_peak", "device"}
    assert set(content["stopped"]) == {"1x8", "4x16", "1 x text"}
    for stopped in content["stopped"].values():
        assert (stopped["reason"], stopped["rounds"], stopped["asked"]) == ("runs", 12, None)
    assert [note.split(":")[0] for note in content["notes"][:3]] == ["1x8", "4x16", "1 x text"]
    assert all("of host memory at most" in note for note in content["notes"][3:])
    assert len(content["measurements"]) == 3 * 2
    for entry in content["measurements"]:
        samples = entry["latency"]["samples"]
        assert len(samples) == entry["latency"]["runs"] == 12
        assert entry["latency"]["p90"] == pytest.approx(np.percentile(samples, 90))
        assert (entry["speedup"] is None) == (entry["artifact"] == "bert")
        assert entry["latency"]["unit"] == "ms"
        assert entry["latency"]["first"] > 0
        assert entry["energy"] is None
    machine = content["environment"]
    assert machine["command"] == "pst bench a b"
    assert machine["threads"] == 1
    assert machine["versions"]["onnxruntime"]
    assert machine["cpu"]


def test_ratios_are_those_of_the_samples(measurement: tuple[Report, Path]) -> None:
    report, _ = measurement
    base, sparse = report.of("bert"), report.of("bert-2of4")
    for one, other in zip(base, sparse, strict=True):
        assert other.speedup is not None
        ratios = np.array(one.latency.samples) / np.array(other.latency.samples)
        assert other.speedup.ratio == pytest.approx(np.median(ratios))
        assert other.speedup.low is not None
        assert other.speedup.high is not None
        assert other.speedup.low <= other.speedup.ratio <= other.speedup.high


def test_report_md_and_terminal(measurement: tuple[Report, Path]) -> None:
    report, output = measurement
    text = (output / "report.md").read_text(encoding="utf-8")
    for words in (
        "first ms",
        "p50 ms",
        "p99 ms",
        "bert-2of4",
        "| 1x8 |",
        "| 4x16 |",
        "2:4",
        "50.0%",
        "`pst bench a b`",
        "warm-up",
    ):
        assert words in text
    assert report.verdicts()[0] in text
    screen = report.render()
    assert "baseline" in screen
    assert report.verdicts()[0][:40] in screen
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:4]}) == 1


def test_memory_energy_and_plan_stand_beside_the_times(measurement: tuple[Report, Path]) -> None:
    """As on a GPU: the same report with what a GPU would tell."""
    report, _ = measurement
    energy = Energy(mj_per_inference=271.8, inferences=900, seconds=1.1, clock_mhz=1980)
    memory = Memory(host_loaded=10**6, host_peak=31_400_000, device=161_800_000)
    told = dataclasses.replace(
        report,
        subjects=tuple(
            dataclasses.replace(each, memory=memory, plan_bytes=27_200_000, engine="tensorrt")
            for each in report.subjects
        ),
        measurements=tuple(dataclasses.replace(each, energy=energy) for each in report.measurements),
    )
    html = page(told.to_json(), machine=[])
    for text in (told.to_markdown(), told.render(), html):
        for words in ("plan MB", "27.2", "host MB", "31.4", "GPU MB", "161.8", "mJ", "271.8", "first ms"):
            assert words in text
    assert "one step of the driver's counter" in told.method
    assert "one step of the driver's counter" not in report.method
    assert told.to_json()["measurements"][0]["energy"]["watts"] == pytest.approx(222.4, abs=0.1)


@pytest.mark.parametrize(("factor", "slowed"), [(3.0, True), (0.9, False)])
def test_a_profile_with_launches_in_it_is_told(measurement: tuple[Report, Path], factor: float, slowed: bool) -> None:
    """In all that people read, with the median of the receipt's own artifact and shape; and nothing follows from it."""
    report, _ = measurement
    total = {(each.artifact, each.workload): each.total_ms for each in report.receipts}
    last = report.receipts[-1]
    changed = tuple(
        dataclasses.replace(each, latency=dataclasses.replace(each.latency, samples=(time / factor,) * 3))
        for each in report.measurements
        if (time := total.get((each.subject, each.workload)))
    )
    told = dataclasses.replace(report, measurements=changed)
    content = told.to_json()
    sentence = f"The profile took {last.total_ms:.2f} ms where an inference takes {last.total_ms / factor:.2f}:"
    for text, claim in (
        (told.to_markdown(), "if they took no time"),
        (told.render(), "if they took no time"),
        (page(content, machine=[]), "no sparse kernel can do more"),
    ):
        assert (sentence in text) == slowed
        assert (claim in text) != slowed
    assert len(content["receipts"]) == 4
    assert {each["limit"] is None for each in content["receipts"]} == {slowed}


def test_a_shape_is_measured_until_its_ratio_is_known(
    bert_artifact: Path, sparse_artifact: Path, tmp_path: Path
) -> None:
    """Within half the ratio, which every machine can."""
    paths = [bert_artifact, sparse_artifact]
    report = bench(
        paths, shapes=[(1, 8)], output=tmp_path / "r", threads=1, warmup=1, runs=2, precision=0.5, receipt=False
    )
    stopped = report.stopped["1x8"]
    assert stopped.reason == "precision"
    assert stopped.half_width is not None
    assert stopped.half_width <= 0.5
    assert stopped.rounds >= LEAST_ROUNDS
    assert report.notes()[0] in (tmp_path / "r" / "report.md").read_text(encoding="utf-8")
    assert report.notes()[0] in " ".join(report.render().split())


def test_one_artifact_alone_has_no_ratio(tmp_path: Path, bert_artifact: Path) -> None:
    report = bench([bert_artifact / "model.onnx"], shapes=[(1, 4)], output=tmp_path / "r", threads=1, warmup=1, runs=2)
    assert report.verdicts() == []
    assert report.subjects[0].pattern is None
    assert (tmp_path / "r" / "report.md").is_file()


def test_an_existing_report_is_kept(tmp_path: Path, bert_artifact: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    with pytest.raises(RunError, match="--overwrite"):
        bench([bert_artifact], shapes=[(1, 4)], output=tmp_path, runs=1)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "old"}
    bench([bert_artifact], shapes=[(1, 4)], output=tmp_path, threads=1, warmup=1, runs=1, overwrite=True)
    assert (tmp_path / "report.json").read_text() != "old"
    assert (tmp_path / "report.md").is_file()


def test_user_errors(tmp_path: Path, bert_artifact: Path, reviews_file: Path) -> None:
    output = tmp_path / "report"
    with pytest.raises(ConfigError, match="nothing to measure"):
        bench([], shapes=[(1, 4)], output=output)
    with pytest.raises(ConfigError, match="--runs"):
        bench([bert_artifact], shapes=[(1, 4)], output=output, runs=0)
    with pytest.raises(ConfigError, match=r"--precision 1\.5 is no share"):
        bench([bert_artifact], shapes=[(1, 4)], output=output, precision=1.5)
    with pytest.raises(ConfigError, match="longer than bert can read"):
        bench([bert_artifact], shapes=[(1, 65)], output=output)
    with pytest.raises(ConfigError, match="given twice"):
        bench([bert_artifact, bert_artifact], shapes=[(1, 4)], output=output)
    with pytest.raises(ArtifactError, match="does not exist"):
        bench([tmp_path / "nowhere"], shapes=[(1, 4)], output=output)
    with pytest.raises(ConfigError, match="no tokenizer"):
        bench([bert_artifact / "model.onnx"], shapes=[(1, 4)], output=output, data=DataSpec(data=str(reviews_file)))
    assert not output.exists()


def test_names_tell_artifacts_apart() -> None:
    paths = [Path("/x/dense/artifact"), Path("/x/sparse/artifact")]
    assert list(unique_names(paths)) == ["dense/artifact", "sparse/artifact"]
    assert list(unique_names([Path("/x/a"), Path("/x/b")])) == ["a", "b"]
