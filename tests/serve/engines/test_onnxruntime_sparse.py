"""Kernels that skip zeros, in ONNX Runtime on a processor: the graph against the file, the engine, and the compiler."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import manifest
from export.pipeline import export
from pst.errors import ArtifactError, EngineError
from serve.bench.receipt import receipts
from serve.bench.workload import random_workload
from serve.engines import Engine, _sparse_library, open_engine
from serve.engines import _onnxruntime_sparse as module
from serve.engines._onnxruntime_sparse import CHOSEN, register, sparse_graph
from serve.engines._sparse_layout import ANYWHERE, DENSEST, DENSEST_OF_FEW, TWO_OF_FOUR
from serve.engines._sparse_library import COMPILERS, sparse_library
from serve.engines.onnxruntime import OnnxRuntimeEngine
from serve.generate import Generator

from ...decoders import make_decoder, prune
from .sparse_weights import two_of_four, with_zeros

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS), reason="needs a C compiler: apt-get install gcc libc6-dev"
)

on_cpu = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="auto takes the GPU here"
)


def _model(nodes: list[Any], constants: dict[str, Any], *, shape: list[Any], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SPARSE, DENSE = with_zeros(48, 64, density=0.2), with_zeros(48, 64, density=0.9, seed=1)
HALF, PAIRS = with_zeros(48, 64, density=0.5, seed=2), two_of_four(48, 64)
BIAS, OTHER = np.arange(48, dtype=np.float32), np.ones(48, np.float32)
MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")


def _gemm(**attributes: Any) -> Any:
    return helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="product", **attributes)


GRAPHS: dict[str, tuple[list[Any], dict[str, Any], list[str], int]] = {
    "matmul": ([MATMUL], {"w": SPARSE.T}, ["y"], 1),
    "matmul and bias": (
        [MATMUL, helper.make_node("Add", ["b", "y"], ["z"])], {"w": SPARSE.T, "b": BIAS}, ["z"], 1,
    ),
    "a sum that is read twice": (
        [MATMUL, helper.make_node("Add", ["y", "b"], ["z"]), helper.make_node("Relu", ["y"], ["r"])],
        {"w": SPARSE.T, "b": BIAS}, ["z", "r"], 1,
    ),
    "a bias for each token": (
        [MATMUL, helper.make_node("Add", ["y", "b"], ["z"])],
        {"w": SPARSE.T, "b": np.arange(7 * 48, dtype=np.float32).reshape(7, 48)}, ["z"], 1,
    ),
    "one weight, two biases": (
        [MATMUL, helper.make_node("Add", ["y", "b"], ["z"]), helper.make_node("MatMul", ["x", "w"], ["v"], name="two"),
         helper.make_node("Add", ["v", "c"], ["u"])],
        {"w": SPARSE.T, "b": BIAS, "c": OTHER}, ["z", "u"], 2,
    ),
    "gemm": ([_gemm()], {"w": SPARSE.T, "b": BIAS}, ["y"], 1),
    "gemm, stored by outputs": ([_gemm(transB=1)], {"w": SPARSE, "b": BIAS}, ["y"], 1),
    "gemm with a factor": ([_gemm(transB=1, alpha=2.0)], {"w": SPARSE, "b": BIAS}, ["y"], 0),
    "half": ([MATMUL], {"w": HALF.T}, ["y"], 1),
    "2:4": ([MATMUL, helper.make_node("Add", ["b", "y"], ["z"])], {"w": PAIRS.T, "b": BIAS}, ["z"], 1),
    "2:4, gemm, stored by outputs": ([_gemm(transB=1)], {"w": PAIRS, "b": BIAS}, ["y"], 1),
    "too dense": ([MATMUL], {"w": DENSE.T}, ["y"], 0),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graph_computes_what_the_file_does(kind: str, threads: int, tmp_path: Path) -> None:
    nodes, constants, outputs, count = GRAPHS[kind]
    shape: list[Any] = ["n", 64] if "gemm" in kind else ["n", 7, 64]
    file = tmp_path / "model.onnx"
    onnx.save(_model(nodes, constants, shape=shape, outputs=outputs), str(file))
    found = sparse_graph(file, threads=threads)
    assert len(found.held) == min(count, 1)
    if not count:
        assert found.content == b""
        assert list(found.too_dense) == ([] if "factor" in kind else ["w"])
        return
    operators = [node.op_type for node in onnx.load_from_string(found.content).graph.node]
    assert operators.count(TWO_OF_FOUR if "2:4" in kind else ANYWHERE) == count
    assert "MatMul" not in operators and "Gemm" not in operators  # noqa: PT018 - neither of the two
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    register(options, onnxruntime)
    ours, theirs = onnxruntime.InferenceSession(found.content, options), onnxruntime.InferenceSession(str(file))
    for rows in (1, 5, 40):
        x = np.random.default_rng(rows).standard_normal((rows, *shape[1:]), np.float32)
        for got, expected in zip(ours.run(None, {"x": x}), theirs.run(None, {"x": x}), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 12, 300])
@pytest.mark.parametrize("weight", [with_zeros(500, 400, density=0.25), two_of_four(500, 400)], ids=["anywhere", "2:4"])
def test_threads_change_no_bit(weight: "np.ndarray[Any, Any]", tokens: int, tmp_path: Path) -> None:
    file, found = tmp_path / "model.onnx", []
    onnx.save(_model([MATMUL], {"w": weight.T}, shape=["n", 400], outputs=["y"]), str(file))
    x = np.random.default_rng(0).standard_normal((tokens, 400), np.float32)
    for threads in (1, 2, 5):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        register(options, onnxruntime)
        session = onnxruntime.InferenceSession(sparse_graph(file, threads=threads).content, options)
        found.append(session.run(None, {"x": x})[0])
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    np.testing.assert_allclose(found[0], x.astype(np.float64) @ weight.T, atol=1e-4)


def test_what_cannot_be_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="is not a whole ONNX model"):
        sparse_graph(file, threads=1)
    onnx.save(_model([MATMUL], {"w": SPARSE.T}, shape=["n", 64], outputs=["y"]), str(file))
    monkeypatch.setattr(module, "LARGEST", 1000)
    with pytest.raises(EngineError, match=r"too large for sparse kernels, which take up to 1\.9 GB"):
        sparse_graph(file, threads=1)


def test_an_old_runtime() -> None:
    class Old:
        __version__ = "1.16.3"

    with pytest.raises(EngineError, match=r"need ONNX Runtime 1\.18 or newer"):
        register(onnxruntime.SessionOptions(), Old)


# -- the engine ----------------------------------------------------------------------------------------------------


def _feeds(engine: Engine, batch: int, tokens: int) -> dict[str, "np.ndarray[Any, Any]"]:
    return dict(random_workload((batch, tokens), vocab_size=30).feeds_of(0, engine.inputs))


def test_the_engine_answers_as_the_plain_one(mostly_zeros: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        open_engine(mostly_zeros, engine="onnxruntime", threads=1) as plain,
        open_engine(mostly_zeros, engine="onnxruntime-sparse", threads=2) as ours,
    ):
        assert isinstance(ours, OnnxRuntimeEngine)
        assert ours.name == "onnxruntime-cpu-sparse"
        listed = {each.initializer for each in manifest.load(mostly_zeros).weights}
        assert ours.sparse_weights == listed
        assert len(listed) == 12
        assert "12 of 13 products with weights of " in capsys.readouterr().err
        for batch, tokens in ((1, 4), (3, 9), (16, 32), (1, 1)):
            feeds = _feeds(plain, batch, tokens)
            expected = plain.infer(feeds)["logits"]
            np.testing.assert_allclose(ours.infer(feeds)["logits"], expected, atol=1e-5)


@on_cpu
def test_auto_skips_zeros_where_there_are_enough(
    mostly_zeros: Path, sparse_artifact: Path, bert_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in ((mostly_zeros, "cpu-sparse"), (sparse_artifact, "cpu-sparse"), (bert_artifact, "cpu")):
        capsys.readouterr()
        with open_engine(folder, engine="auto", threads=1) as engine:
            assert engine.name == f"onnxruntime-{name}"
        assert capsys.readouterr().err == ""  # what nobody has asked for needs no word: the engine's name tells


def test_a_dense_artifact_runs_as_it_is(bert_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        open_engine(bert_artifact, engine="onnxruntime", threads=1) as plain,
        open_engine(bert_artifact, engine="onnxruntime-sparse", threads=1) as ours,
    ):
        assert isinstance(ours, OnnxRuntimeEngine)
        assert not ours.sparse_weights
        assert "0 of 13 products with weights of " in capsys.readouterr().err
        feeds = _feeds(plain, 2, 8)
        assert ours.infer(feeds)["logits"].tobytes() == plain.infer(feeds)["logits"].tobytes()
        profiler = ours.profiler()
        profiler.run(feeds)
        assert {each.operator for each in profiler.finish(weights=())} >= {"MatMul", "Softmax"}


def test_the_receipt(
    mostly_zeros: Path, bert_artifact: Path, sparse_artifact: Path, sparse_model: Callable[..., Path], tmp_path: Path
) -> None:
    export(sparse_model("unstructured", 0.4), tmp_path / "artifact")
    folders = {
        "dense": bert_artifact, "sparse": mostly_zeros, "2of4": sparse_artifact, "dense, nearly": tmp_path / "artifact",
    }  # fmt: skip
    engines = {name: open_engine(path, engine="onnxruntime-sparse", threads=1) for name, path in folders.items()}
    manifests = {name: manifest.load(path) for name, path in folders.items()}
    found = {each.artifact: each for each in receipts(engines, manifests, [random_workload((2, 8), vocab_size=30)])}
    for artifact, operator in (("sparse", ANYWHERE), ("2of4", TWO_OF_FOUR)):
        ran = [layer for layer in found[artifact].layers if layer.sparse_kernel]
        assert len(ran) == len(found[artifact].layers) == 12
        for layer in ran:
            assert layer.operator == operator
            assert layer.why == CHOSEN.format(kernel=operator, share=layer.density)
            assert layer.time_ms is not None and layer.baseline_ms is not None  # noqa: PT018 - both of one layer
    assert not any(layer.sparse_kernel for name in ("dense", "dense, nearly") for layer in found[name].layers)
    assert {layer.why for layer in found["dense, nearly"].layers} == {
        f"60% of it are not zero, and skipping zeros pays up to {DENSEST:.0%}"
    }
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("pattern", ["1:4", "2:4"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_with_its_cache(kind: str, pattern: str, tmp_path: Path) -> None:
    folder = prune(make_decoder(tmp_path / "model", kind), pattern)
    export(folder, tmp_path / "artifact")
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    said = []
    for name in ("onnxruntime", "onnxruntime-sparse"):
        with Generator(tmp_path / "artifact", engine=name, threads=1) as model:
            assert bool(getattr(model.engine, "sparse_weights")) == (name == "onnxruntime-sparse")  # noqa: B009
            said.append(model.generate(prompts, max_new_tokens=12))
    assert said[0] == said[1]


def test_a_decoder_needs_more_zeros_but_in_2of4(tmp_path: Path) -> None:
    """With half of them a few tokens at a time, which is how it writes, are slower than dense."""
    folder = prune(make_decoder(tmp_path / "model", "gpt2"), "4:8")
    export(folder, tmp_path / "artifact")
    found = sparse_graph(tmp_path / "artifact" / "model.onnx", threads=1)
    assert (found.few, found.held, found.content) == (True, {}, b"")
    assert not module.may_skip_zeros(tmp_path / "artifact")
    weight = next(each for each in manifest.load(tmp_path / "artifact").weights if each.initializer in found.too_dense)
    assert found.explain(weight, pattern="4:8", place=None).why == (
        f"50% of it are not zero, and skipping zeros pays up to {DENSEST_OF_FEW:.0%} where a few tokens are read at a "
        "time, or in 2:4"
    )


# -- the compiler --------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    sparse_library.cache_clear()
    yield tmp_path
    sparse_library.cache_clear()


def test_it_is_compiled_once(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sparse_library()
    assert first.parent == nothing_compiled / "sparse-pst" / "sparse-cpu"
    sparse_library.cache_clear()
    run = _sparse_library._run

    def no_compiling(command: list[str]) -> "subprocess.CompletedProcess[str]":
        assert command[-1] == "--version"
        return run(command)

    monkeypatch.setattr(_sparse_library, "_run", no_compiling)
    assert sparse_library() == first


def test_a_compiler_that_does_not_know_this_processor(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sparse_library, "NATIVE", (("-march=no-such-processor",), ()))
    assert ctypes.CDLL(str(sparse_library())).pst_sparse_linear


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("false", r"false cannot compile the sparse kernels \(no reason given\); choose the engine onnxruntime"),
     ("no-such-compiler -O2", r"C compiler no-such-compiler does not run .*; set CC to one that does")],
)  # fmt: skip
def test_a_compiler_that_fails(
    nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch, mostly_zeros: Path, compiler: str, words: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(EngineError, match=words):
        open_engine(mostly_zeros, engine="onnxruntime-sparse")


@on_cpu
def test_auto_without_a_compiler(
    nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch, mostly_zeros: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with open_engine(mostly_zeros, engine="auto", threads=1) as engine:
        assert engine.name == "onnxruntime-cpu"
        assert not getattr(engine, "sparse_weights")  # noqa: B009 - of this engine alone
    assert "Zeros are multiplied like any other number. The sparse kernels are compiled" in capsys.readouterr().err


def test_no_compiler(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch, mostly_zeros: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match=r"no C compiler; install one .*apt-get install gcc libc6-dev"):
        open_engine(mostly_zeros, engine="onnxruntime-sparse")
