"""How often bench opens an engine: once, for the accuracy and the times, or as often as --openings says."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serve.bench.runner
import serve.evaluate
import serve.holder
from pst.data import DataSpec, Examples, load_whole
from pst.errors import ConfigError, DataError
from serve.bench.runner import bench
from serve.engines import open_engine
from serve.evaluate import evaluate
from serve.layers import LayerTimes

MODULES = (serve.bench.runner, serve.holder)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each artifact was opened, whoever did it."""
    counts: Counter[str] = Counter()

    def count(path: Path, **options: Any) -> Any:
        counts[path.name] += 1
        return open_engine(path, **options)

    for module in MODULES:
        monkeypatch.setattr(module, "open_engine", count)
    return counts


def test_classifiers(
    bert_artifact: Path, sparse_artifact: Path, reviews_file: Path, tmp_path: Path, opened: Counter[str]
) -> None:
    paths, data = [bert_artifact, sparse_artifact], DataSpec(data=str(reviews_file))
    report = bench(paths, shapes=[(1, 8)], output=tmp_path / "r", threads=1, warmup=1, runs=1, precision=0, data=data)
    assert opened == {"bert": 1, "bert-2of4": 1}
    for path, subject in zip(paths, report.subjects, strict=True):
        assert subject.accuracy is not None
        assert subject.accuracy.value == evaluate(path, data, threads=1).value


def test_the_data_set_is_read_once(
    bert_artifact: Path, sparse_artifact: Path, reviews_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[DataSpec] = []

    def count(spec: DataSpec) -> Examples:
        read.append(spec)
        return load_whole(spec)

    monkeypatch.setattr(serve.evaluate, "load_whole", count)
    data = DataSpec(data=str(reviews_file))
    report = bench(
        [bert_artifact, sparse_artifact], shapes=[(1, 8)], output=tmp_path / "r", threads=1, warmup=1, runs=1,
        precision=0, data=data, receipt=False,
    )  # fmt: skip
    assert read == [data]
    assert all(subject.accuracy is not None for subject in report.subjects)
    assert {each.workload for each in report.measurements} == {"1x8", "1 x text"}


def test_an_engine_that_was_given_stays_open(bert_artifact: Path, reviews_file: Path, opened: Counter[str]) -> None:
    data = DataSpec(data=str(reviews_file))
    with open_engine(bert_artifact, threads=1) as engine:
        first = evaluate(bert_artifact, data, engine=engine)
        assert first.metrics == evaluate(bert_artifact, data, engine=engine).metrics
        assert first.engine == engine.name
    assert not opened


def test_data_that_does_not_fit_is_found_before_anything_is_opened(
    bert_artifact: Path, tmp_path: Path, opened: Counter[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"good film,{label}\n" for label in range(5)), encoding="utf-8")
    with pytest.raises(DataError):
        bench([bert_artifact], shapes=[(1, 8)], output=tmp_path / "r", data=DataSpec(data=str(rows)))
    assert not opened
    assert not (tmp_path / "r").exists()


def test_the_interval_of_several_openings_is_that_of_their_ratios(
    bert_artifact: Path, sparse_artifact: Path, tmp_path: Path, opened: Counter[str]
) -> None:
    report = bench(
        [bert_artifact, sparse_artifact], shapes=[(1, 8), (2, 8)], output=tmp_path / "r", threads=1, warmup=1, runs=20,
        openings=6,
    )  # fmt: skip
    assert opened == {"bert": 6, "bert-2of4": 6}
    for workload, stopped in report.stopped.items():
        assert (stopped.openings, stopped.rounds, stopped.asked) == (6, 24, None)
        assert ", in 6 openings, every ratio is within " in stopped.sentence(workload)
        mine, theirs = (
            np.asarray(entry.latency.samples).reshape(6, 4) for entry in report.measurements
            if entry.workload == workload
        )  # fmt: skip
        ratios = np.median(mine / theirs, axis=1)
        speedup = next(entry.speedup for entry in report.measurements if entry.workload == workload and entry.speedup)
        assert (speedup.low, speedup.high) == pytest.approx((ratios.min(), ratios.max()))
        assert speedup.ratio == pytest.approx(np.median(ratios))
        assert speedup.rounds == 6


@pytest.mark.parametrize(
    ("third", "says"),
    [
        (
            (True, False),
            "bert-2of4 were timed at each of 6 openings, always with the same choice: 8 x 4 sparse, 4 x 8 dense.",
        ),
        (
            (True, True),
            "bert-2of4 were timed at each of 6 openings, and the choice differed: 8 x 4 sparse in 6, 4 x 8 sparse in "
            "1. Of 2 choices the most frequent was made 5 times; the ratios are those of all.",
        ),
    ],
)
def test_layers_that_are_chosen_anew_at_each_opening(
    bert_artifact: Path, sparse_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    third: tuple[bool, bool], says: str,
) -> None:  # fmt: skip
    """As torch-cuda-sparse-autotune does on a GPU; here an engine that only says so."""
    opened: list[Any] = []

    def choosing(path: Path, **options: Any) -> Any:
        engine: Any = open_engine(path, **options)
        if path == sparse_artifact:
            opened.append(engine)
            engine.layer_times = layers(*(third if len(opened) == 3 else (True, False)))
        return engine

    monkeypatch.setattr(serve.bench.runner, "open_engine", choosing)
    paths, more = [bert_artifact, sparse_artifact], {"threads": 1, "warmup": 1, "receipt": False}
    report = bench(paths, shapes=[(1, 8)], output=tmp_path / "r", runs=6, openings=6, **more)  # type: ignore[arg-type]
    assert len(opened) == 6
    said = [note for note in report.notes() if note.startswith("Layers of")]
    assert said == [f"Layers of {says}"]
    for name in ("report.md", "report.json", "report.html"):
        assert said[0] in (tmp_path / "r" / name).read_text(encoding="utf-8")
    once = bench(paths, shapes=[(1, 8)], output=tmp_path / "once", runs=2, precision=0, **more)  # type: ignore[arg-type]
    assert "Layers of bert-2of4: 8 x 4 sparse (2.00×), 4 x 8 dense (0.50×)." in once.notes()


def layers(*sparse: bool) -> tuple[LayerTimes, ...]:
    slow, fast = {"1x8": (2.0,) * 60}, {"1x8": (1.0,) * 60}
    return tuple(
        LayerTimes(
            outputs=outputs, inputs=inputs, weights=(f"{outputs}",), dense=slow if each else fast,
            sparse=fast if each else slow,
        )
        for (outputs, inputs), each in zip(((8, 4), (4, 8)), sparse, strict=True)
    )  # fmt: skip


def test_too_few_openings_are_refused(bert_artifact: Path, tmp_path: Path, opened: Counter[str]) -> None:
    with pytest.raises(ConfigError, match="--openings 5 are too few for an interval; give 6 or more, or 1"):
        bench([bert_artifact], shapes=[(1, 8)], output=tmp_path / "r", openings=5)
    assert not opened
