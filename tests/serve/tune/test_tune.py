"""Tuning from artifacts to tuned.json: real ones in ONNX Runtime, and stand-ins whose times are known."""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.pipeline import export
from pst.errors import ArtifactError, ConfigError, EngineError, RunError
from pst.files import write_json
from pst.patterns.structured import Structured
from pst.result import sparsity_of
from pst.sparsify import merge_, set_sparsity_, sparsify_
from serve.engines import Array, Engine, Shapes, TensorSpec
from serve.layers import LayerTimes
from serve.tune import candidates as candidates_module
from serve.tune.candidates import candidates
from serve.tune.run import tune
from serve.tune.serving import Serving, serving
from serve.tune.words import render, sentences

from ...command_line import done

SHAPES = [(1, 8), (4, 16)]


@pytest.fixture(scope="session")
def structured_artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with heads and neurons removed, as pst export writes it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("structured")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    sparsify_(model, pattern=Structured(multiple=4))
    set_sparsity_(model, 0.4)
    merge_(model)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder / "model")
    write_json(
        folder / "model" / "sparsity.json", sparsity_of(model, method="pst", pattern="structured", requested=0.4)
    )
    export(folder / "model", folder / "structured")
    return folder / "structured"


class StandIn:
    """An engine whose inferences take as long as the test says, by a clock of the test's own."""

    def __init__(self, path: Path, engine: str, milliseconds: Callable[[str, int], float], clock: "Clock") -> None:
        self.name, self.threads, self.load_ms, self.max_length = engine, 1, 1.0, 64
        axes = ("batch_size", "sequence_length")
        self.inputs = {"input_ids": TensorSpec(name="input_ids", dtype="int64", shape=axes)}
        self.outputs: Mapping[str, TensorSpec] = {}
        self._path, self._milliseconds, self._clock = path, milliseconds, clock

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._clock.now += self._milliseconds(self._path.name, len(feeds["input_ids"])) / 1000
        return {}

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, int], float]], Clock]:
    """``timed(milliseconds)``: from here on engines take ``milliseconds(artifact's folder, batch)``, with 1% noise."""

    def use(milliseconds: Callable[[str, int], float]) -> Clock:
        clock, random = Clock(), np.random.default_rng(0)

        def noisy(name: str, batch: int) -> float:
            return milliseconds(name, batch) * float(np.exp(0.01 * random.standard_normal()))

        def open_engine(path: Path, *, engine: str, **_: Any) -> Any:
            if engine == "tensorrt":
                raise EngineError("tensorrt is not installed; install it.")
            return StandIn(path, "onnxruntime-cpu", noisy, clock)

        monkeypatch.setattr(candidates_module, "open_engine", open_engine)
        return clock

    return use


Timed = Callable[[Callable[[str, int], float]], Clock]


def written(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "tuned.json").read_text(encoding="utf-8"))
    return value


def test_the_fastest_is_chosen_and_the_others_say_why(
    timed: Timed, bert_artifact: Path, sparse_artifact: Path, structured_artifact: Path, tmp_path: Path
) -> None:
    times = {bert_artifact.name: 10.0, sparse_artifact.name: 10.0, structured_artifact.name: 5.0}
    clock = timed(lambda name, batch: batch * times[name])
    paths = [sparse_artifact, bert_artifact, structured_artifact]
    found = tune(paths, shapes=SHAPES, output=tmp_path / "tuned", clock=clock, receipt=False)
    assert [each.chosen.path for each in (*found.workloads, found.overall)] == [structured_artifact] * 3
    report = written(tmp_path / "tuned")
    assert report["schema_version"] == 2
    assert report["overall"]["command"] == f"pst serve {tmp_path / 'tuned'}"
    for part in (*report["workloads"], report["overall"]):
        assert not part["keeps_dense"]
        assert part["speedup"]["low"] > 1.9
        assert part["artifact"] == str(structured_artifact)
        assert part["engine"] == "onnxruntime-cpu"
        rows = {row["candidate"]: row for row in part["rows"]}
        sparse = rows[f"{sparse_artifact.name} on onnxruntime-cpu"]
        assert sparse["why"].startswith(("no faster than dense", "not clearly faster than dense"))
        assert "multiply zeros like any other number" in sparse["zeros"]
        assert sparse["measured"] == "search"
        assert rows[f"{bert_artifact.name} on onnxruntime-cpu"]["speedup"] is None
    assert "Over all workloads structured on onnxruntime-cpu is chosen: 2.0" in render(found)


def test_the_command_serves_from_any_folder(
    timed: Timed, bert_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    clock = timed(lambda name, batch: 10.0)
    found = tune([bert_artifact], shapes=SHAPES, output=Path("my tuned"), clock=clock, receipt=False)
    monkeypatch.chdir(tmp_path)
    command = written(tmp_path / "here" / "my tuned")["overall"]["command"]
    assert f"Serve it: {command}" in sentences(found)
    *words, folder = shlex.split(command)
    assert words == ["pst", "serve"]
    assert serving(Path(folder), engine="auto", threads=0).path == bert_artifact


def test_where_sparse_does_not_pay_dense_is_kept(
    timed: Timed, bert_artifact: Path, sparse_artifact: Path, tmp_path: Path
) -> None:
    clock = timed(lambda name, batch: 10.0 if name == bert_artifact.name else 9.95)
    found = tune(
        [bert_artifact, sparse_artifact], shapes=SHAPES, output=tmp_path / "t", engine="onnxruntime", clock=clock,
        receipt=False,
    )  # fmt: skip
    report = written(tmp_path / "t")
    for part in (*report["workloads"], report["overall"]):
        assert part["keeps_dense"]
        assert part["artifact"] == str(bert_artifact)
        assert part["speedup"] is None
        (sparse,) = (row for row in part["rows"] if row["speedup"] is not None)
        assert sparse["measured"] == "final"
        assert sparse["speedup"]["low"] < 1.02
        assert sparse["why"] in ("no faster than dense", "not clearly faster than dense")
        assert "multiply zeros" in sparse["zeros"]
    assert "At 1x8 dense is kept" in render(found)


def test_a_form_that_makes_zeros_look_fast_is_said(
    timed: Timed, bert_artifact: Path, sparse_artifact: Path, tmp_path: Path
) -> None:
    clock = timed(lambda name, batch: 10.0 if name == bert_artifact.name else 8.0)
    found = tune([bert_artifact, sparse_artifact], shapes=SHAPES, output=tmp_path / "t", clock=clock)
    (said,) = found.advice
    assert said.startswith(
        f"No sparse kernel ran in {sparse_artifact.name} on onnxruntime-cpu, so that its zeros are not"
    )


def test_over_all_shapes_nothing_is_chosen_that_is_slower_at_one(
    timed: Timed, bert_artifact: Path, structured_artifact: Path, tmp_path: Path
) -> None:
    clock = timed(lambda name, batch: 10.0 if name == bert_artifact.name else {1: 11.0, 4: 2.0}[batch])
    found = tune([bert_artifact, structured_artifact], shapes=SHAPES, output=tmp_path / "t", clock=clock)
    assert [each.chosen.is_dense for each in (*found.workloads, found.overall)] == [True, False, True]
    (row,) = (row for row in found.overall.rows if row.speedup is not None)
    assert row.why == "slower than dense at 1x8; on the whole faster than dense"
    assert row.speedup is not None
    assert row.speedup.ratio > 2


def test_traffic_counts_time(timed: Timed, bert_artifact: Path, structured_artifact: Path, tmp_path: Path) -> None:
    clock = timed(lambda name, batch: batch * (10.0 if name == bert_artifact.name else {1: 10.0, 4: 5.0}[batch]))
    found = tune(
        [bert_artifact, structured_artifact], shapes=SHAPES, output=tmp_path / "t", clock=clock,
        counts={(1, 8): 36.0, (4, 16): 1.0},
    )  # fmt: skip
    assert found.by == "traffic"
    assert found.overall.speedup is not None
    # 36 x 10 ms and 40 ms dense, 36 x 10 ms and 20 ms structured.
    assert found.overall.speedup.ratio == pytest.approx(400 / 380, rel=0.01)
    assert [each.count for each in found.workloads] == [36.0, 1.0]


def test_a_missing_runtime_is_left_out(
    timed: Timed, bert_artifact: Path, structured_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = timed(lambda name, batch: 10.0 if name == bert_artifact.name else 5.0)
    found = tune(
        [bert_artifact, structured_artifact], shapes=SHAPES, output=tmp_path / "t", clock=clock,
        engine="tensorrt,onnxruntime",
    )  # fmt: skip
    assert found.overall.chosen.name == "structured on onnxruntime"
    assert [(each.artifact, each.engine) for each in found.left_out] == [
        (bert_artifact.name, "tensorrt"), ("structured", "tensorrt"),
    ]  # fmt: skip
    assert capsys.readouterr().err.count("tensorrt is not installed; install it.") == 1
    assert (
        f"Left out: {bert_artifact.name}, structured on tensorrt. tensorrt is not installed; install it."
        in sentences(found)
    )


def test_no_dense_runtime_at_all(timed: Timed, bert_artifact: Path, sparse_artifact: Path, tmp_path: Path) -> None:
    timed(lambda name, batch: 1.0)
    with pytest.raises(EngineError, match=r"No dense artifact opens.* tensorrt is not installed; install it"):
        tune([bert_artifact, sparse_artifact], shapes=SHAPES, output=tmp_path / "t", engine="tensorrt")
    assert not (tmp_path / "t").exists()


def test_real_artifacts_in_onnx_runtime(
    bert_artifact: Path, sparse_artifact: Path, structured_artifact: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """Which is fastest is the machine's to say; that the choice follows from the numbers is ours."""
    out = done(
        "bench", bert_artifact, sparse_artifact, structured_artifact, tiny_bert, "--tune", "--engine",
        "onnxruntime,torch-cpu", "--shapes", "1x8,4x16", "--runs", "24", "--warmup", "2", "--budget", "6", "--threads",
        "1", "--output", tmp_path / "tuned",
    )  # fmt: skip
    report = written(tmp_path / "tuned")
    dense = {each["name"] for each in report["candidates"] if each["is_dense"]}
    assert len(report["candidates"]) == 4
    assert len(dense) == 2
    for part in (*report["workloads"], report["overall"]):
        rows = {row["candidate"]: row for row in part["rows"]}
        assert rows.keys() == {each["name"] for each in report["candidates"]}
        assert part["keeps_dense"] == (part["chosen"] in dense)
        assert part["keeps_dense"] or part["speedup"]["low"] >= 1.02
        assert part["dense"] in dense
        assert rows[part["chosen"]]["measured"] == "final"
    zeros = [row["zeros"] for row in report["workloads"][0]["rows"] if "2of4" in row["candidate"]]
    assert zeros == ["ONNX Runtime has no sparse kernel for MatMul: it multiplies zeros like any other number"] or (
        "2of4" in report["workloads"][0]["chosen"]
    )
    assert f"Serve it: {report['overall']['command']}" in out


def test_serving_takes_what_was_chosen(
    timed: Timed, bert_artifact: Path, structured_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = Path(shutil.copytree(structured_artifact, tmp_path / "structured"))
    clock = timed(lambda name, batch: 10.0 if name == bert_artifact.name else 5.0)
    tune([bert_artifact, copy], shapes=SHAPES, output=tmp_path / "tuned", clock=clock, threads=1)
    chosen = Serving(path=copy, engine="onnxruntime-cpu", threads=1, shapes=Shapes(fixed=tuple(SHAPES)))
    assert serving(tmp_path / "tuned", engine="auto", threads=0) == chosen
    assert serving(tmp_path / "tuned" / "tuned.json", engine="auto", threads=0) == chosen
    plain = Serving(path=bert_artifact, engine="torch", threads=3)
    assert serving(bert_artifact, engine="torch", threads=3) == plain
    said = capsys.readouterr().err
    assert f"chose structured on onnxruntime-cpu ({copy}), measured at 1x8, 4x16." in said
    assert "Tuned elsewhere" not in said
    with pytest.raises(ConfigError, match="leave --engine and --threads out"):
        serving(tmp_path / "tuned", engine="torch", threads=0)
    report = written(tmp_path / "tuned")
    write_json(tmp_path / "tuned" / "tuned.json", {**report, "environment": {**report["environment"], "cpu": "Z80"}})
    serving(tmp_path / "tuned", engine="auto", threads=0)
    assert "Tuned elsewhere: cpu: Z80, then " in capsys.readouterr().err
    (copy / "export.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="has changed since; run pst bench --tune again"):
        serving(tmp_path / "tuned", engine="auto", threads=0)
    shutil.rmtree(copy)
    with pytest.raises(ArtifactError, match="is not there any more"):
        serving(tmp_path / "tuned", engine="auto", threads=0)


def test_which_layers_run_sparse_is_written_and_served(
    timed: Timed, bert_artifact: Path, structured_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = {"1x8": (2.0,) * 60}, {"1x8": (1.0,) * 60}
    layers = (
        LayerTimes(outputs=8, inputs=4, weights=("a", "c"), dense=slow, sparse=fast),
        LayerTimes(outputs=4, inputs=8, weights=("b",), dense=fast, sparse=slow),
    )
    monkeypatch.setattr(StandIn, "layer_times", layers, raising=False)
    clock = timed(lambda name, batch: 10.0 if name == bert_artifact.name else 5.0)
    found = tune([bert_artifact, structured_artifact], shapes=SHAPES, output=tmp_path / "t", clock=clock, threads=1)
    report = written(tmp_path / "t")
    assert report["overall"]["faster_sparse"] == ["a", "c"]
    row = next(each for each in report["candidates"] if each["artifact"] == "structured")
    assert [(each["weights"], each["is_sparse"]) for each in row["layers"]] == [(["a", "c"], True), (["b"], False)]
    assert "Layers of structured on onnxruntime-cpu: 8 x 4 sparse (2.00×), 4 x 8 dense (0.50×)." in sentences(found)
    assert serving(tmp_path / "t", engine="auto", threads=0).shapes.faster_sparse == ("a", "c")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"schema_version": 2, "measurements": []}, "is not the result of a tuning"),
        ({"schema_version": 99, "overall": {}}, "schema version 99, this program reads up to 2"),
        ({"schema_version": 1, "overall": {}}, "is of an earlier program, .*; tune again"),
        ({"schema_version": 2, "overall": {"artifact": "x"}}, "is not a whole tuned.json"),
    ],
)
def test_what_is_no_tuned_json(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    write_json(tmp_path / "tuned.json", content)
    with pytest.raises(RunError, match=says):
        serving(tmp_path, engine="auto", threads=0)


def test_which_engines_auto_tries(
    bert_artifact: Path, sparse_artifact: Path, mostly_zeros: Path, tiny_bert: Path, sparse_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    paths = [bert_artifact, sparse_artifact, tiny_bert, sparse_model("2:4")]
    monkeypatch.setattr(candidates_module, "gpus", list)
    skipping = ["onnxruntime-cpu", "onnxruntime-cpu", "onnxruntime-sparse"]
    assert [each.engine for each in candidates(paths, engine="auto")] == [*skipping, "torch-cpu", "torch-cpu"]
    assert [each.engine for each in candidates([bert_artifact, mostly_zeros], engine="auto")] == skipping
    for pair, alone in ((paths[:2], "onnxruntime-sparse"), (paths[2:], "torch-cuda-sparse")):  # no other runs the dense
        assert [each.is_dense for each in candidates(pair, engine=alone)] == [True, False]
    monkeypatch.setattr(candidates_module, "gpus", lambda: ["a GPU"])
    found = candidates(paths, engine="auto")
    for each in found:
        assert not (each.is_dense and "sparse" in each.engine), "2:4 kernels refuse a model without zeros"
    assert [each.engine for each in found if each.path == paths[3]] == [
        "torch-cuda", "torch-cuda-fp16-compiled", "torch-cuda-sparse-compiled", "torch-cuda-sparse-autotune-compiled",
    ]  # fmt: skip
    assert [each.engine for each in found if each.path == bert_artifact] == [
        "onnxruntime-cuda", "tensorrt", "onnxruntime-cpu",
    ]  # fmt: skip


def test_stand_ins_are_engines(bert_artifact: Path) -> None:
    engine: Engine = StandIn(bert_artifact, "x", lambda name, batch: 1.0, Clock())  # type: ignore[assignment]
    assert engine.infer({"input_ids": np.zeros((1, 1), dtype=np.int64)}) == {}
