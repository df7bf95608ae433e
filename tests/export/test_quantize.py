"""int8: the integers against numpy's own rounding, zeros, patterns, what runs in ONNX Runtime, and what is refused."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers
from onnx import TensorProto, helper, numpy_helper

from export import quantize
from export.cases import CALIBRATION_ROWS, calibration_rows
from export.graph import find_weights, load_onnx
from export.inspect import inspect
from export.manifest import Manifest
from export.pipeline import export
from export.quantize import verify_quantized
from export.real_inputs import calibration_texts
from export.source import load_source
from pst.data import DataSpec
from pst.errors import ArtifactError, ConfigError, ModelError
from pst.patterns import parse_pattern
from serve.classify import Classifier
from tests.export.rtx_parser import outputs_that_tensorrt_rtx_reads

from ..command_line import environment
from ..conftest import write_reviews
from ..decoders import make_decoder, prune
from ..encoders import ARCHITECTURES, HEADS, make_encoder
from .conftest import graph, matmul_model
from .test_matrix import PATTERNS, PRUNED

CELLS = [
    (kind, tuple(HEADS)[number % len(HEADS)], PATTERNS[number % len(PATTERNS)], ("uint8", "int8")[number % 2])
    for number, kind in enumerate(ARCHITECTURES)
] + [
    ("bert", "classification", "2:4", "int8"),
    ("gpt2", "text_generation", "4:8", "uint8"),
    ("llama", "text_generation", "2:4", "uint8"),
]
ATOL = 8.0  # random weights of 32 features lose more than a trained model does
Cell = tuple[str, str, str, str]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], tuple[Path, Path]]:
    """``exported(cell)``: the tiny sparse model's folder, and its artifact. Read only."""
    made: dict[Cell, tuple[Path, Path]] = {}
    spec = DataSpec(data=str(write_reviews(tmp_path_factory.mktemp("data") / "reviews.jsonl", rows=64, seed=1)))

    def make(cell: Cell) -> tuple[Path, Path]:
        if cell not in made:
            kind, head, pattern, activations = cell
            folder = tmp_path_factory.mktemp("cell") / "model"
            prune(make_decoder(folder, kind) if head not in HEADS else make_encoder(folder, kind, head), pattern)
            artifact = folder.parent / "artifact"
            export(
                folder, artifact, precision="int8", activations=activations, atol=ATOL,
                calibration=calibration_texts(folder, spec),
            )  # fmt: skip
            made[cell] = folder, artifact
        return made[cell]

    return make


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_integers_are_the_weights_rounded(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    """Oracle: scale = largest / 127 (or 64) of each output, integer = the nearest one."""
    kind, head, pattern, activations = cell
    folder, artifact = exported(cell)
    manifest = Manifest.load(artifact)
    assert (manifest.precision, manifest.pattern) == ("int8", pattern)
    assert manifest.quantization is not None
    assert manifest.quantization["activations"] == activations
    state = getattr(transformers, HEADS.get(head, "AutoModelForCausalLM")).from_pretrained(folder).state_dict()
    stored = {weight.name: weight for weight in find_weights(load_onnx(artifact / "model.onnx"))}
    assert len(manifest.weights) == PRUNED.get(kind, 12)
    for row in manifest.weights:
        weight = stored[row.initializer]
        trained = state[row.name].numpy() if kind == "gpt2" else state[row.name].numpy().T  # inputs x outputs
        values = np.moveaxis(weight.values(), weight.axis, 0)
        assert values.dtype == np.int8
        most = 64 if activations == "uint8" else 127
        assert np.abs(values.astype(int)).max() == most
        scale = np.abs(trained).max(axis=0) / most
        expected = trained / np.where(scale == 0, 1, scale)
        assert np.abs(values - expected).max() <= 0.5 + 1e-3
        assert not values[trained == 0].any()
        assert parse_pattern(pattern).holds((values != 0) | (trained != 0), axis=0)
        assert row.density == np.count_nonzero(values) / values.size
        if ":" in pattern and "block" not in pattern:
            assert parse_pattern(pattern).holds(weight.values(), axis=weight.axis)


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_what_runs_in_onnx_runtime(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]], tmp_path: Path) -> None:
    """With uint8 activations, every pruned weight is multiplied in integers; with int8, the file at least opens."""
    kind, head, _, activations = cell
    _, artifact = exported(cell)
    model = onnx.load(artifact / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    points = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kinds = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            kinds.add(points[node.input[2]].dtype.name)
            assert activations == "uint8" or not points[node.input[2]].any()  # TensorRT takes no other
    assert kinds == {activations}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(artifact / "model.onnx"), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    if activations == "uint8" and onnxruntime.get_available_providers() == ["CPUExecutionProvider"]:
        assert counts["MatMulIntegerToFloat"] + counts["QGemm"] == PRUNED.get(kind, 12), head


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[3] == "int8"], ids=" ".join)
def test_tensorrt_rtx_reads_int8_activations(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    _, artifact = exported(cell)
    assert outputs_that_tensorrt_rtx_reads(artifact / "model.onnx") > 0


def test_inspect_and_answers(exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    folder, artifact = exported(("bert", "classification", "2:4", "uint8"))
    rows = {row.name: row for row in inspect(artifact).weights}
    named = [row for name, row in rows.items() if "encoder" in name]
    assert len(named) == 12
    assert {(row.dtype, row.prunable, row.patterns[0]) for row in named} == {("int8", True, "2:4")}
    assert rows["classifier.weight"].dtype == "float"
    texts = ["the film is lovely .", "a dull , tedious plot !"]
    with Classifier(artifact) as quantized, Classifier(folder, engine="torch") as exact:
        pairs = zip(quantized.predict(texts), exact.predict(texts), strict=True)
        assert all(abs(a.scores["POSITIVE"] - b.scores["POSITIVE"]) < 0.2 for a, b in pairs)


def test_calibration_rows_are_spread_and_unpadded(tiny_bert: Path, tmp_path: Path) -> None:
    source = load_source(tiny_bert)
    texts = calibration_texts(tiny_bert, DataSpec(data=str(write_reviews(tmp_path / "many.jsonl", rows=400, seed=2))))
    rows = list(calibration_rows(source, texts))
    assert len(texts) > len(rows) == CALIBRATION_ROWS
    assert all(row["attention_mask"].all() for row in rows)
    assert len({row["input_ids"].shape[1] for row in rows}) > 3
    last = source.tokenizer(texts.first[-1], return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(rows[-1]["input_ids"], last)


def quantized_product(weight: Array) -> Any:
    """A model that multiplies with *weight*, called W, quantized."""
    model = matmul_model(weight)
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, weight.shape[0]])
    model.graph.input[0].CopyFrom(shape)
    random = np.random.default_rng(0)
    rows = [{"x": random.standard_normal((1, weight.shape[0])).astype(np.float32)} for _ in range(4)]
    quantize.quantize(model, {"W": 0}, rows, activations="uint8")
    return model


def test_a_tampered_weight_is_refused() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    weight[::2] = 0
    model = quantized_product(weight)
    (info,) = verify_quantized(model, {"W": weight}, {"W": 0}, pattern="2:4")
    assert (info.density, info.axis) == (0.5, 0)
    with pytest.raises(ArtifactError, match="Pattern 1:4 does not hold in W"):
        verify_quantized(model, {"W": weight}, {"W": 0}, pattern="1:4")
    with pytest.raises(ArtifactError, match="not the trained weight"):
        verify_quantized(model, {"W": weight * 1.5}, {"W": 0}, pattern="dense")
    with pytest.raises(ArtifactError, match="V was not quantized"):
        verify_quantized(model, {"V": weight}, {"V": 0}, pattern="dense")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "W")
    changed = numpy_helper.to_array(tensor).copy()
    changed[0, 0] = 1
    tensor.CopyFrom(numpy_helper.from_array(changed, "W"))
    with pytest.raises(ArtifactError, match="W lost zeros"):
        verify_quantized(model, {"W": weight}, {"W": 0}, pattern="dense")


def test_an_output_without_weights_stays_zero() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    weight[:, 2] = 0
    model = quantized_product(weight)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones((1, 8), np.float32)})
    assert found[0, 2] == 0.0
    (stored,) = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "W")
    assert not stored[:, 2].any()
    (info,) = verify_quantized(model, {"W": weight}, {"W": 0}, pattern="unstructured")
    assert info.density == np.count_nonzero(stored) / 32 <= 0.75


def test_refusals(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 needs real text"):
        export(tiny_bert, tmp_path / "out", precision="int8")
    with pytest.raises(ConfigError, match="Unknown type of activations 'int4'"):
        export(tiny_bert, tmp_path / "out", activations="int4")
    with pytest.raises(ModelError, match="no linear of a transformer block"):
        quantize.quantize(graph([], {}), {"W": 0}, [], activations="int8")
    assert not (tmp_path / "out").exists()


def test_same_bytes_in_two_processes(tiny_bert: Path, tmp_path: Path) -> None:
    """Sets and dictionaries of libraries come in another order in each process; what is written must not."""
    data = write_reviews(tmp_path / "reviews.jsonl", rows=64, seed=1)
    written = []
    for seed in ("1", "2"):
        command = [
            sys.executable, "-m", "cli", "export", str(tiny_bert), "--output", seed, "--precision", "int8",
            "--storage", "sparse", "--data", str(data), "--atol", str(ATOL),
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(PYTHONHASHSEED=seed), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "accuracy on 64 rows" in done.stdout
        written.append({path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()})
    assert written[0] == written[1]
