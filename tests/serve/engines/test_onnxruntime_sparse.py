"""Kernels that skip zeros, in ONNX Runtime on a processor: the product against numpy, the graph against the file."""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
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
from serve.engines._sparse_library import COMPILERS, DENSEST, sparse_library
from serve.engines.onnxruntime import OnnxRuntimeEngine
from serve.generate import Generator

from ...decoders import make_decoder, prune

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS), reason="needs a C compiler: apt-get install gcc libc6-dev"
)

on_cpu = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="auto takes the GPU here"
)


def _pointer(array: "np.ndarray[Any, Any]") -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _multiply(
    x: "np.ndarray[Any, Any]", weight: "np.ndarray[Any, Any]", bias: "np.ndarray[Any, Any]", *, inputs: int = 0
) -> "np.ndarray[Any, Any]":
    rows, columns = np.nonzero(weight)
    starts = np.searchsorted(rows, np.arange(len(weight) + 1)).astype(np.int32)
    values, at = weight[rows, columns], columns.astype(np.int32)
    y = np.full((len(x), len(weight)), np.nan, np.float32)
    sizes = (ctypes.c_int64(size) for size in (len(x), inputs or x.shape[1], len(weight)))
    ctypes.CDLL(str(sparse_library())).pst_sparse_linear(*map(_pointer, (x, values, at, starts, bias, y)), *sizes)
    return y


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 33, 48, 50, 63, 64, 65, 100, 130, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 5), (16, 16), (17, 63), (64, 48), (100, 129)])
def test_the_product_is_that_of_numpy(tokens: int, outputs: int, inputs: int) -> None:
    random = np.random.default_rng(tokens * outputs + inputs)
    density = random.choice([0.0, 0.1, 0.5, 1.0])
    weight = random.standard_normal((outputs, inputs), np.float32) * (random.random((outputs, inputs)) < density)
    x, bias = random.standard_normal((tokens, inputs), np.float32), random.standard_normal(outputs, np.float32)
    expected = x.astype(np.float64) @ weight.T + bias
    np.testing.assert_allclose(_multiply(x, weight, bias), expected, atol=1e-5, rtol=1e-5)


def test_without_memory_it_still_multiplies() -> None:
    """A row that is said to be so long that no tile of it fits, of which the weight reads the first numbers alone."""
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(shape, np.float32) for shape in ((1, 8), (5, 8), (5,)))
    np.testing.assert_allclose(_multiply(x, weight, bias, inputs=2**52), x @ weight.T + bias, atol=1e-5)


def _weight(outputs: int, inputs: int, *, density: float, seed: int = 0) -> "np.ndarray[Any, Any]":
    random = np.random.default_rng(seed)
    kept = random.random((outputs, inputs)) < density
    return random.standard_normal((outputs, inputs), np.float32) * kept


def _model(nodes: list[Any], constants: dict[str, Any], *, shape: list[Any], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


SPARSE, DENSE = _weight(48, 64, density=0.2), _weight(48, 64, density=0.9, seed=1)
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
    "too dense": ([MATMUL], {"w": DENSE.T}, ["y"], 0),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graph_computes_what_the_file_does(kind: str, threads: int, tmp_path: Path) -> None:
    nodes, constants, outputs, count = GRAPHS[kind]
    shape: list[Any] = ["n", 64] if kind.startswith("gemm") else ["n", 7, 64]
    file = tmp_path / "model.onnx"
    onnx.save(_model(nodes, constants, shape=shape, outputs=outputs), str(file))
    found = sparse_graph(file, threads=threads)
    assert len(found.held) == min(count, 1)
    if not count:
        assert found.content == b""
        assert list(found.too_dense) == ([] if "factor" in kind else ["w"])
        return
    operators = [node.op_type for node in onnx.load_from_string(found.content).graph.node]
    assert operators.count("SparseLinear") == count
    assert "MatMul" not in operators and "Gemm" not in operators  # noqa: PT018 - neither of the two
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    register(options, onnxruntime)
    ours, theirs = onnxruntime.InferenceSession(found.content, options), onnxruntime.InferenceSession(str(file))
    for rows in (1, 5, 40):
        x = np.random.default_rng(rows).standard_normal((rows, *shape[1:]), np.float32)
        for got, expected in zip(ours.run(None, {"x": x}), theirs.run(None, {"x": x}), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4)


def test_threads_change_no_bit(tmp_path: Path) -> None:
    file, found = tmp_path / "model.onnx", []
    onnx.save(_model([MATMUL], {"w": SPARSE.T}, shape=["n", 64], outputs=["y"]), str(file))
    x = np.random.default_rng(0).standard_normal((300, 64), np.float32)
    for threads in (1, 2, 5):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        register(options, onnxruntime)
        session = onnxruntime.InferenceSession(sparse_graph(file, threads=threads).content, options)
        found.append(session.run(None, {"x": x})[0])
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()


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
    for folder, name in ((mostly_zeros, "cpu-sparse"), (sparse_artifact, "cpu"), (bert_artifact, "cpu")):
        capsys.readouterr()
        with open_engine(folder, engine="auto", threads=1) as engine:
            assert engine.name == f"onnxruntime-{name}"
        assert ("skip zeros" in capsys.readouterr().err) == (name == "cpu-sparse")


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


def test_the_receipt(mostly_zeros: Path, bert_artifact: Path, sparse_artifact: Path) -> None:
    folders = {"dense": bert_artifact, "sparse": mostly_zeros, "2of4": sparse_artifact}
    engines = {name: open_engine(path, engine="onnxruntime-sparse", threads=1) for name, path in folders.items()}
    manifests = {name: manifest.load(path) for name, path in folders.items()}
    found = {each.artifact: each for each in receipts(engines, manifests, [random_workload((2, 8), vocab_size=30)])}
    ran = [layer for layer in found["sparse"].layers if layer.sparse_kernel]
    assert len(ran) == len(found["sparse"].layers) == 12
    for layer in ran:
        assert layer.operator == "SparseLinear"
        assert layer.why == CHOSEN.format(share=layer.density)
        assert layer.time_ms is not None and layer.baseline_ms is not None  # noqa: PT018 - both of one layer
    assert not any(layer.sparse_kernel for name in ("dense", "2of4") for layer in found[name].layers)
    assert {layer.why for layer in found["2of4"].layers} == {
        f"50% of it are not zero, and skipping zeros pays up to {DENSEST:.0%}"
    }
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_with_its_cache(kind: str, tmp_path: Path) -> None:
    folder = prune(make_decoder(tmp_path / "model", kind), "1:4")
    export(folder, tmp_path / "artifact")
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    said = []
    for name in ("onnxruntime", "onnxruntime-sparse"):
        with Generator(tmp_path / "artifact", engine=name, threads=1) as model:
            assert bool(getattr(model.engine, "sparse_weights")) == (name == "onnxruntime-sparse")  # noqa: B009
            said.append(model.generate(prompts, max_new_tokens=12))
    assert said[0] == said[1]


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
