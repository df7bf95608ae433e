"""fp16 and bf16 in the graph: the rule by which types are given, read off the graph, and numbers against oracles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from export import passes, pipeline
from export.graph import find_weights, load_onnx
from export.manifest import Manifest
from export.pipeline import export
from export.precision import IN_FLOAT32, PRECISIONS, RESIDUALS, to_precision
from export.widen import widen
from pst.errors import ArtifactError, ConfigError, EngineError, ModelError
from pst.patterns import parse_pattern
from serve.engines import open_engine
from serve.generate import Generator
from tests.export.rtx_parser import outputs_that_tensorrt_rtx_reads

from ..decoders import make_decoder, prune
from ..encoders import ARCHITECTURES, HEADS, make_encoder
from .conftest import graph, matmul_model

TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
PATTERNS = ("2:4", "unstructured", "block:4x4", "1:4", "4:8")
CELLS = [
    (kind, tuple(HEADS)[number % len(HEADS)], PATTERNS[number % len(PATTERNS)], precision)
    for number, kind in enumerate(ARCHITECTURES)
    for precision in TYPES
] + [(kind, "text_generation", "2:4", precision) for kind in ("gpt2", "llama") for precision in TYPES]
FORMS = ("auto", "gemm", "conv")
HEAD = "classification"
Cell = tuple[str, str, str, str]
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], tuple[Path, Path]]:
    """``exported(cell)``: the tiny sparse model's folder, and its artifact. Read only."""
    made: dict[Cell, tuple[Path, Path]] = {}

    def make(cell: Cell) -> tuple[Path, Path]:
        if cell not in made:
            kind, head, pattern, precision = cell
            folder = tmp_path_factory.mktemp("cell") / "model"
            prune(make_decoder(folder, kind) if head not in HEADS else make_encoder(folder, kind, head), pattern)
            form = FORMS[CELLS.index(cell) % 3]
            opset = 22 if (form, precision) == ("conv", "bf16") else 17
            export(folder, folder.parent / "artifact", precision=precision, linear_form=form, opset=opset)
            made[cell] = folder, folder.parent / "artifact"
        return made[cell]

    return make


def kinds(model: Any) -> dict[str, int]:
    """The element type of each value, as onnx infers it."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info)}
    found |= {value.name: value.type.tensor_type.elem_type for value in inferred.output}
    return found | {tensor.name: tensor.data_type for tensor in inferred.initializer}


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_types_follow_the_rule(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    _, artifact = exported(cell)
    half = helper.np_dtype_to_tensor_dtype(TYPES[cell[3]])
    model = onnx.load(artifact / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    types, products = kinds(model), []
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in IN_FLOAT32:
            floats = {types[name] for name in (*node.input, *node.output)} - {TensorProto.INT64}
            assert floats == {TensorProto.FLOAT}, node
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            products.append(types[node.output[0]])
        if node.op_type == "LayerNormalization" or (node.op_type == "Pow" and cell[0] == "llama"):
            # The residual stream has not been in half; the embeddings, which it begins with, are stored so.
            assert makers[node.input[0]].op_type != "Cast" or makers[makers[node.input[0]].input[0]].op_type == "Gather"
        if node.op_type in ("Cos", "Sin"):
            assert types[node.output[0]] == TensorProto.FLOAT
    assert products.count(half) >= 2 * 6  # of two layers: each weight, scores and context
    assert products.count(TensorProto.FLOAT) == (0 if cell[1] == "feature_extraction" else 1)  # the head's
    for name, info in {value.name: value for value in Manifest.load(artifact).outputs}.items():
        assert info.dtype == (TYPES[cell[3]].name if name.startswith("present.") else "float32")
    for value in model.graph.input:
        assert types[value.name] == (half if value.name.startswith("past_") else TensorProto.INT64)


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_weights_are_the_trained_ones_rounded(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    folder, artifact = exported(cell)
    kind, head, pattern, precision = cell
    auto = HEADS.get(head, "AutoModelForCausalLM")
    state = getattr(transformers, auto).from_pretrained(folder).state_dict()
    stored = {weight.name: weight for weight in find_weights(load_onnx(artifact / "model.onnx"))}
    manifest = Manifest.load(artifact)
    assert (manifest.precision, manifest.pattern) == (precision, pattern)
    for row in manifest.weights:
        weight = stored[row.initializer]
        trained = state[row.name].numpy() if kind == "gpt2" else state[row.name].numpy().T  # inputs x outputs
        matrix, axis = weight.matrix()
        values = np.moveaxis(matrix, axis, 0)
        assert values.dtype == TYPES[precision]
        np.testing.assert_array_equal(values.astype(np.float32), trained.astype(TYPES[precision]).astype(np.float32))
        np.testing.assert_array_equal(values == 0, trained == 0)
        assert parse_pattern(pattern).holds(matrix, axis=axis)


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_tensorrt_rtx_reads_it(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    _, artifact = exported(cell)
    assert outputs_that_tensorrt_rtx_reads(artifact / "model.onnx") > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_in_fp16(kind: str, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    folder, artifact = exported((kind, "text_generation", "2:4", "fp16"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = np.random.default_rng(0).integers(4, 35, (40, 6))
    with torch.inference_mode():
        scores = model(torch.from_numpy(prompts)).logits[:, -1]
    clear = (scores.topk(2).values.diff(dim=-1).abs() > 0.2).flatten().numpy()  # beyond what rounding can turn
    assert clear.sum() > 20
    with Generator(artifact, threads=1) as generator:
        answers = generator.generate(prompts.tolist(), max_new_tokens=3)
    first = np.array([answer[0] for answer in answers])
    np.testing.assert_array_equal(first[clear], scores.argmax(-1).numpy()[clear])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_residual_stream_in_half(tmp_path: Path, kind: str) -> None:
    """LayerNorms read and write half, sums too; logits stay float32, and the manifest says which it is."""
    source = make_decoder(tmp_path / kind, kind) if kind == "gpt2" else make_encoder(tmp_path / kind, kind, HEAD)
    made = {name: export(source, tmp_path / name, precision="fp16", residual=name) for name in RESIDUALS}
    assert {name: manifest.residual for name, manifest in made.items()} == {"fp32": "fp32", "half": "half"}
    assert Manifest.load(tmp_path / "half") == made["half"]
    for name, wanted in (("fp32", TensorProto.FLOAT), ("half", TensorProto.FLOAT16)):
        model = onnx.load(tmp_path / name / "model.onnx")
        types = kinds(model)
        norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
        assert len(norms) == 5
        assert {types[node.input[0]] for node in norms} == {types[node.output[0]] for node in norms} == {wanted}
        assert types["logits"] == TensorProto.FLOAT
    error = {name: manifest.parity.max_abs_error for name, manifest in made.items()}
    assert 0 < error["fp32"] < 0.1
    assert 0 < error["half"] < 0.1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_no_residual_stream_in_half_without_a_half_type(tmp_path: Path, precision: str) -> None:
    with pytest.raises(ConfigError, match=f"needs a half type; use --precision fp16, not {precision}"):
        export(tmp_path, tmp_path / "out", precision=precision, residual="half", calibration=object())
    with pytest.raises(ConfigError, match="Unknown type 'fp8' of the residual stream; use one of fp32, half"):
        export(tmp_path, tmp_path / "out", precision="fp16", residual="fp8")


def test_bf16_on_a_processor_is_refused_in_words(exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    _, artifact = exported(("bert", "classification", "2:4", "bf16"))
    with pytest.raises(EngineError, match=r"cannot compute .*model\.onnx on this device: .* --precision fp32"):
        open_engine(artifact, engine="onnxruntime-cpu", threads=1)


def test_a_defect_is_not_taken_for_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fp32 would not forgive is found before a half type's wider tolerance could hide it."""

    def shifted(model: Any, weights: Any) -> list[str]:
        names = passes.run_passes(model, weights)
        head = next(tensor for tensor in model.graph.initializer if tensor.name == "classifier.weight")
        head.raw_data = (numpy_helper.to_array(head) * np.float32(1.01)).tobytes()
        return names

    monkeypatch.setattr(pipeline, "run_passes", shifted)
    folder = make_encoder(tmp_path / "model", "bert", "classification")
    with pytest.raises(ArtifactError, match=r"differs from PyTorch by .* tolerance of 0\.0001"):
        export(folder, tmp_path / "out", precision="bf16")


def test_constants_and_weights_beyond_the_range() -> None:
    weight = np.full((4, 4), 0.5, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "lowest"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    for precision, least in (("fp16", -65504.0), ("bf16", -3.3895314e38)):
        model = graph(nodes, {"w": weight, "lowest": np.array([np.finfo(np.float32).min], np.float32)})
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]))
        stored = to_precision(model, {"w": weight}, precision=precision, outputs=["y"])
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert stored["w"].dtype == tensors["w"].dtype == TYPES[precision]
        (constant,) = [array for name, array in tensors.items() if name.startswith("lowest")]
        assert constant.astype(np.float32) == np.float32(least)
    for value, fits in ((65504.0, True), (65520.0, False)):
        model, large = matmul_model(np.full((4, 4), value, np.float32)), np.full((4, 4), value, np.float32)
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4]))
        if fits:
            to_precision(model, {"W": large}, precision="fp16", outputs=["y"])
        else:
            with pytest.raises(ArtifactError, match="W holds numbers beyond 65504"):
                to_precision(model, {"W": large}, precision="fp16", outputs=["y"])


def test_what_cannot_be_rewritten() -> None:
    weight = np.ones((4, 4), np.float32)
    model = matmul_model(weight)
    before = model.SerializeToString(deterministic=True)
    assert to_precision(model, {"W": weight}, precision="fp32", outputs=["y"]).keys() == {"W"}
    assert model.SerializeToString(deterministic=True) == before
    with pytest.raises(ConfigError, match="Unknown precision 'fp8'; use one of fp32, fp16, bf16"):
        to_precision(model, {}, precision="fp8", outputs=["y"])
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(ModelError, match="subgraphs, which cannot be written in fp16"):
        to_precision(graph([node], {"c": np.array(True)}), {}, precision="fp16", outputs=["y"])


@pytest.mark.parametrize("precision", TYPES)
def test_a_widened_graph_rounds_after_each_operator(precision: str) -> None:
    """Oracle: numpy in float32, rounded by ml_dtypes."""
    random = np.random.default_rng(0)
    kind = TYPES[precision]
    weight, x = random.standard_normal((8, 8)).astype(kind), random.standard_normal((3, 8)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Mul", ["b", "b"], ["y"])]  # fmt: skip
    model = graph(nodes, {"w": weight})
    for value, shape in ((model.graph.input[0], ["n", 8]), (model.graph.output[0], ["n", 8])):
        value.CopyFrom(helper.make_tensor_value_info(value.name, PRECISIONS[precision], shape))
    wide = widen(model, PRECISIONS[precision])
    onnx.checker.check_model(wide, full_check=True)
    session = onnxruntime.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    product = (x.astype(kind).astype(np.float32) @ weight.astype(np.float32)).astype(kind).astype(np.float32)
    expected = np.square(np.maximum(product, 0)).astype(kind).astype(np.float32)
    found = session.run(None, {"x": x})[0]
    assert (found == found.astype(kind).astype(np.float32)).all()
    assert np.mean(found == expected) > 0.9  # sums of another order round to a neighbour now and then
    np.testing.assert_allclose(found, expected, rtol=2**-6)
