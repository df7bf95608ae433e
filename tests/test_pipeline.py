"""Train, export, evaluate, inspect, measure, serve: each command reads what the one before it wrote, and all agree.

The judges are a stranger's tools: transformers' tokenizer, a bare InferenceSession, numpy on the graph's initializers.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pst.data import DataSpec, load_whole
from serve.http.client import ask

from .command_line import ROOT, command, done, environment
from .conftest import write_reviews

Array = np.ndarray[Any, Any]
QUICKSTART = Path(os.environ.get("PST_QUICKSTART", ROOT / "runs" / "quickstart"))
"""The folder of a finished ``pst quickstart``, for the tests on the real model and the real reviews."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The folders of one model."""

    pattern: str
    run: Path
    artifact: Path
    data: Path


def needs(path: Path) -> Path:
    """*path* of a finished quickstart; skips the test where there is none."""
    if not path.exists():
        pytest.skip(f"{path} is not there; run pst quickstart first")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 128 training and 50 validation rows."""
    folder = tmp_path_factory.mktemp("data")
    write_reviews(folder / "train.jsonl", rows=128, seed=1)
    write_reviews(folder / "validation.jsonl", rows=50, seed=2)
    return folder


@pytest.fixture(scope="module", params=["dense", "unstructured", "2:4"])
def stages(
    request: pytest.FixtureRequest, tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Stages:
    """The tiny BERT, trained and exported by the commands."""
    folder = tmp_path_factory.mktemp("stages")
    choice = {"dense": ("--method", "dense"), "unstructured": ("--sparsity", "0.7"), "2:4": ("--pattern", "2:4")}
    options = ("--steps", "30", "--set", "batch_size=16", "--set", "r1=2", "--set", "r2=2", "--set", "max_length=16")
    train = ("train", "--model", tiny_bert, "--data", data, *choice[request.param], *options)
    done(*train, "--output", folder / "run")
    done("export", folder / "run", "--output", folder / "artifact")
    return Stages(pattern=request.param, run=folder / "run", artifact=folder / "artifact", data=data)


# -- quality -------------------------------------------------------------------------------------------------------


def assert_close(scores: Array, others: Array) -> None:
    """Scores of two runtimes in float32, all between 0 and 1."""
    np.testing.assert_allclose(scores, others, atol=1e-5, rtol=1e-4)


def predictions(path: Path, data: Path, tmp_path: Path) -> tuple[Array, Array, dict[str, Any]]:
    """Class and scores of every row as ``pst eval`` writes them, and its result."""
    file = tmp_path / f"{path.name}.jsonl"
    result = json.loads(done("eval", path, "--data", data, "--predictions", file, "--json"))
    written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(written) == result["rows"]
    return np.array([row["prediction"] for row in written]), np.array([row["scores"] for row in written]), result


def plain_scores(artifact: Path, texts: list[str], *, batch_size: int = 32) -> Array:
    """What a stranger gets: the artifact's tokenizer and an InferenceSession, a softmax, none of our code."""
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact)
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    logits = np.empty((len(texts), 2))
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # texts of like length, for speed alone
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        encoded = tokenizer([texts[row] for row in rows], truncation=True, padding=True, return_tensors="np")
        logits[rows] = session.run(None, {name: encoded[name].astype(np.int64) for name in names})[0]
    scores: Array = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return scores


def assert_all_agree(run: Path, artifact: Path, data: Path, tmp_path: Path) -> None:
    """``pst eval`` of the run in PyTorch, of the artifact in ONNX Runtime, and plain tools: the same on every row."""
    examples = load_whole(DataSpec(data=str(data)))
    in_torch, torch_scores, torch_result = predictions(run, data, tmp_path)
    in_onnx, onnx_scores, onnx_result = predictions(artifact, data, tmp_path)
    assert torch_result["engine"].startswith("torch")
    assert onnx_result["engine"].startswith("onnxruntime")
    scores = plain_scores(artifact, examples.first)
    assert len(scores) == len(examples)
    np.testing.assert_array_equal(in_onnx, scores.argmax(axis=1))
    np.testing.assert_array_equal(in_onnx, in_torch)
    assert_close(onnx_scores, scores)
    assert_close(onnx_scores, torch_scores)
    accuracy = float((scores.argmax(axis=1) == examples.labels).mean())
    assert onnx_result["metrics"]["accuracy"] == pytest.approx(accuracy)
    assert torch_result["metrics"] == onnx_result["metrics"]
    assert onnx_result["rows"] == len(examples)


def test_every_row_has_the_same_answer_everywhere(stages: Stages, tmp_path: Path) -> None:
    assert_all_agree(stages.run, stages.artifact, stages.data, tmp_path)


def test_the_run_reported_what_eval_measures(stages: Stages, tmp_path: Path) -> None:
    report = json.loads((stages.run / "model" / "sparsity.json").read_text(encoding="utf-8"))
    *_, result = predictions(stages.artifact, stages.data, tmp_path)
    assert result["metrics"] == pytest.approx(report["metrics"])


def test_the_model_folder_of_a_run_is_the_run(stages: Stages, tmp_path: Path) -> None:
    of_run = predictions(stages.run, stages.data, tmp_path)
    of_model = predictions(stages.run / "model", stages.data, tmp_path)
    np.testing.assert_array_equal(of_run[1], of_model[1])


WITHOUT_TORCH = """
import importlib.machinery
import sys

class Hides:  # finds what the usual finders find, but for these: as on a machine that lacks them
    hidden = {"torch", "transformers", "onnx"}
    finders = list(sys.meta_path)

    def find_distributions(self, *context):
        return importlib.machinery.PathFinder.find_distributions(*context)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Hides()]
import cli
cli.main()
"""


def test_an_artifact_is_evaluated_where_torch_is_not_installed(stages: Stages) -> None:
    """Neither torch nor transformers nor onnx: datasets, which reads the rows, does without them too."""
    arguments = ("eval", str(stages.artifact), "--data", str(stages.data), "--json")
    program = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    ran = subprocess.run(program, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["rows"] == 50


# -- zeros ---------------------------------------------------------------------------------------------------------


def products(file: Path) -> dict[str, tuple[Array, int]]:
    """The 2-D initializers that a MatMul or Gemm multiplies by, with the axis that it sums over."""
    graph = onnx.load(str(file)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found: dict[str, tuple[Array, int]] = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in stored:
            continue
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        found[node.input[1]] = (stored[node.input[1]], 1 if transposed else 0)
    return found


def count_beyond_two_of_four(weight: Array, axis: int) -> int:
    """Groups of four along *axis* with more than two non-zeros, counted one by one."""
    lines = weight if axis == 1 else weight.T
    beyond = 0
    for line in lines.tolist():
        for start in range(0, len(line), 4):
            beyond += sum(value != 0 for value in line[start : start + 4]) > 2
    return beyond


def inspected(path: Path) -> dict[str, dict[str, Any]]:
    """``pst inspect --json``, by the name of the weight."""
    return {row["name"]: row for row in json.loads(done("inspect", path, "--json"))["weights"]}


def assert_zeros_agree(run: Path, artifact: Path, pattern: str) -> None:
    """Of the run, the artifact and the bare file, and counted again with numpy."""
    of_run, of_artifact, of_file = inspected(run), inspected(artifact), inspected(artifact / "model.onnx")
    assert of_artifact == of_file
    assert of_run.keys() == of_artifact.keys()
    for name, row in of_artifact.items():
        assert (row["zeros"], row["size"]) == (of_run[name]["zeros"], of_run[name]["size"]), name
        assert ("2:4" in row["patterns"]) == ("2:4" in of_run[name]["patterns"]), name
    counted = products(artifact / "model.onnx")
    assert {name: int((weight == 0).sum()) for name, (weight, _) in counted.items()} == {
        name: row["zeros"] for name, row in of_artifact.items()
    }
    manifest = json.loads((artifact / "export.json").read_text(encoding="utf-8"))
    pruned = [weight["initializer"] for weight in manifest["weights"]]
    assert len(pruned) == (len(counted) if pattern == "dense" else sum(row["prunable"] for row in of_artifact.values()))
    for name in pruned if pattern != "dense" else ():
        weight, axis = counted[name]
        assert axis == of_artifact[name]["axis"]
        if pattern == "2:4":
            assert count_beyond_two_of_four(weight, axis) == 0, name
            assert int((weight == 0).sum()) * 2 == weight.size, name
            assert "2:4" in of_artifact[name]["patterns"]
    zeros = sum(int((counted[name][0] == 0).sum()) for name in pruned)
    measured = zeros / sum(counted[name][0].size for name in pruned)
    assert manifest["sparsity"]["measured"] == pytest.approx(measured, abs=1e-12)


def test_zeros_are_the_same_everywhere(stages: Stages) -> None:
    assert_zeros_agree(stages.run, stages.artifact, stages.pattern)


def test_the_asked_sparsity_is_there(stages: Stages) -> None:
    wanted = {"dense": 0.0, "unstructured": 0.7, "2:4": 0.5}[stages.pattern]
    for row in inspected(stages.artifact).values():
        asked = int(row["size"] * wanted) if row["prunable"] else 0
        assert row["zeros"] == asked, row["name"]


def test_the_judge_of_two_four_sees_a_wrong_axis() -> None:
    weight = np.ones((4, 8), dtype=np.float32)
    weight[:, ::2] = 0
    assert count_beyond_two_of_four(weight, 1) == 0
    assert count_beyond_two_of_four(weight, 0) == 4


# -- measuring and serving -----------------------------------------------------------------------------------------


def test_bench_reads_every_stage(stages: Stages, tmp_path: Path) -> None:
    options = ("--shapes", "1x8,2x16", "--runs", "3", "--precision", "0", "--warmup", "1", "--data", stages.data)
    done("bench", stages.artifact, stages.run, *options, "--output", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert [item["name"] for item in report["artifacts"]] == ["artifact", "run"]
    assert [item["pattern"] for item in report["artifacts"]] == [stages.pattern] * 2
    *_, result = predictions(stages.artifact, stages.data, tmp_path)
    assert [item["accuracy"]["value"] for item in report["artifacts"]] == [result["value"]] * 2
    assert {row["workload"] for row in report["measurements"]} == {"1x8", "2x16", "1 x text"}


@contextmanager
def server(artifact: Path) -> Iterator[str]:
    """The address of ``pst serve ARTIFACT``, which Ctrl-C must end with exit code 0."""
    process = subprocess.Popen(
        command("serve", artifact, "--port", "0"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        found = (re.search(r"Serving \S+ at (http://\S+)", line) for line in process.stderr)
        match = next((match for match in found if match is not None), None)
        assert match is not None
        yield match[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_the_server_answers_as_eval_does(stages: Stages, tmp_path: Path) -> None:
    examples = load_whole(DataSpec(data=str(stages.data)))
    _, scores, _ = predictions(stages.artifact, stages.data, tmp_path)
    with server(stages.artifact) as url:
        answers = ask(url, examples.first[:10])["predictions"]
    names = ("NEGATIVE", "POSITIVE")
    assert [answer["label"] for answer in answers] == [names[row.argmax()] for row in scores[:10]]
    given = np.array([[answer["scores"][name] for name in names] for answer in answers])
    assert_close(given, scores[:10])


def test_an_artifact_can_be_moved(stages: Stages, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(stages.artifact, tmp_path / "elsewhere"))
    before = predictions(stages.artifact, stages.data, tmp_path)
    after = predictions(moved, stages.data, tmp_path)
    np.testing.assert_array_equal(before[1], after[1])
    text = "".join(path.read_text(encoding="utf-8") for path in moved.glob("*.json"))
    assert str(stages.run.parent) not in text, "an artifact must not tell the paths of the machine that made it"


# -- the real model and the real reviews ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_every_film_review_has_the_same_answer_everywhere(name: str, tmp_path: Path) -> None:
    artifact = needs(QUICKSTART / "artifacts" / name)
    assert_all_agree(QUICKSTART / name, artifact, QUICKSTART / "data", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pattern"), [("dense", "dense"), ("sparse", "unstructured")])
def test_zeros_of_the_real_model_are_the_same_everywhere(name: str, pattern: str) -> None:
    assert_zeros_agree(QUICKSTART / name, needs(QUICKSTART / "artifacts" / name), pattern)


@pytest.mark.slow
def test_two_four_on_film_reviews_builds_a_sparse_plan(tmp_path: Path) -> None:
    from .export.test_tensorrt_rtx import build_plan

    base = needs(QUICKSTART / "dense" / "model")
    run, artifact, data = (tmp_path / name for name in ("run", "artifact", "data"))
    data.mkdir()
    for name, rows in (("train.jsonl", 640), ("validation.jsonl", 100)):  # as many as 20 steps see, to save minutes
        lines = (QUICKSTART / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (data / name).write_text("".join(lines[:rows]), encoding="utf-8")
    options = ("--pattern", "2:4", "--steps", "20", "--set", "max_length=64", "--set", "mask_every=4")
    done("train", "--model", base, "--data", data, *options, "--output", run)
    done("export", run, "--output", artifact)
    assert_zeros_agree(run, artifact, "2:4")
    assert len(build_plan(artifact / "model.onnx", sparse=True, max_batch=8, max_length=64)) > 1_000_000
