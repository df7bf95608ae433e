"""Triton model folders, read by Triton's published schema and held against the ONNX file."""

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format  # type: ignore[import-untyped]

from export.formats import export_as
from export.inspect import inspect
from export.manifest import Manifest
from export.targets.tensorrt import parse_profile
from export.targets.triton import model_config
from pst.errors import ArtifactError, ConfigError
from serve.engines import open_engine
from tests.command_line import pst
from tests.decoders import make_decoder
from tests.export.conftest import Artifact


@pytest.fixture(scope="module")
def schema() -> Any:
    """tritonclient's model_config_pb2, by its file: the package's __init__ wants more than the schema needs."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("Triton's schema is not installed: pip install --no-deps tritonclient")
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(folder: Path, schema: Any) -> Any:
    """The parsed config.pbtxt of *folder*, whose tensors are those of its ONNX file, the batch left out."""
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.name == folder.name
    graph = onnx.load(folder / "1" / "model.onnx").graph
    for stated, real in ((config.input, graph.input), (config.output, graph.output)):
        assert [tensor.name for tensor in stated] == [value.name for value in real]
        for tensor, value in zip(stated, real, strict=True):
            kind = value.type.tensor_type
            name = onnx.TensorProto.DataType.Name(kind.elem_type)
            assert schema.DataType.Name(tensor.data_type) == {"FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16"}.get(
                name, f"TYPE_{name}"
            )
            assert list(tensor.dims) == [-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim][1:]
            assert kind.shape.dim[0].dim_param == "batch_size"
    return config


def test_a_classifier(artifact: Artifact, schema: Any, tmp_path: Path) -> None:
    output = tmp_path / "repository" / "reviews"
    outcome = pst("export", artifact("2:4", 0.5), "--format", "triton", "-o", output, "--profile", "1x1,4x16,16x64")
    assert outcome.code == 0, outcome.err
    config = check(output, schema)
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 16)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, schema.ModelInstanceGroup.KIND_AUTO)]
    (warmup,) = config.model_warmup
    assert (warmup.batch_size, set(warmup.inputs)) == (4, {tensor.name for tensor in config.input})
    assert {tuple(entry.dims) for entry in warmup.inputs.values()} == {(16,)}
    assert all(entry.zero_data for entry in warmup.inputs.values())
    # Version 1 is an artifact like any other.
    assert Manifest.load(output / "1").pattern == "2:4"
    assert inspect(output / "1").kind == "artifact folder"
    with open_engine(output / "1", engine="onnxruntime-cpu", threads=1) as engine:
        assert list(engine.inputs) == [tensor.name for tensor in config.input]


def test_the_warmup_is_what_the_model_can_take(artifact: Artifact, schema: Any, tmp_path: Path) -> None:
    """Zeros, of the shape and type that the configuration states, give finite answers."""
    import numpy as np

    export_as("triton", artifact("2:4", 0.5), tmp_path / "reviews")
    config = check(tmp_path / "reviews", schema)
    warmup = config.model_warmup[0]
    feeds = {
        name: np.zeros((warmup.batch_size, *entry.dims), np.int64) for name, entry in warmup.inputs.items()
    }  # fmt: skip
    with open_engine(tmp_path / "reviews" / "1", engine="onnxruntime-cpu", threads=1) as engine:
        assert np.isfinite(engine.infer(feeds)["logits"]).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_decoder_with_its_cache(precision: str, schema: Any, tmp_path: Path) -> None:
    make_decoder(tmp_path / "model", "llama")
    export_as("triton", tmp_path / "model", tmp_path / "writer", precision=precision)
    config = check(tmp_path / "writer", schema)
    cache = {tensor.name: tensor for tensor in config.input if tensor.name.startswith("past_key_values.")}
    assert len(cache) == 4
    assert {tuple(tensor.dims) for tensor in cache.values()} == {(2, -1, 8)}
    assert not config.model_warmup


def test_a_plan(artifact: Artifact, schema: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    export_as("triton-tensorrt", artifact("2:4", 0.5), tmp_path / "reviews", profile="1x1,2x8,4x16")
    config = check(tmp_path / "reviews", schema)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 4)
    (built,) = (tmp_path / "reviews" / "1" / "plans").glob("*.plan")
    assert (tmp_path / "reviews" / "1" / "model.plan").read_bytes() == built.read_bytes()
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_GPU


def test_external_data_lies_beside_the_graph(tiny_bert: Path, tmp_path: Path) -> None:
    export_as("triton", tiny_bert, tmp_path / "reviews", external_data=True)
    assert (tmp_path / "reviews" / "1" / "model.onnx.data").is_file()
    shutil.move(tmp_path / "reviews", tmp_path / "elsewhere")
    open_engine(tmp_path / "elsewhere" / "1", engine="onnxruntime-cpu", threads=1).close()


@pytest.mark.parametrize("name", ["my model", "modèle", ".hidden", "a:b"])
def test_a_folder_that_can_be_no_model_name_is_refused(name: str, artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        export_as("triton", artifact("2:4", 0.5), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_tensors_that_triton_cannot_take_are_refused(artifact: Artifact) -> None:
    manifest = Manifest.load(artifact("2:4", 0.5))
    profile = parse_profile(None, max_length=64)
    for change, words in (
        ({"shape": ["sequence_length"]}, "no batch dimension"),
        ({"dtype": "complex64"}, "type complex64, which Triton does not have"),
    ):
        stated = manifest.to_json()
        stated["outputs"][0] |= change
        with pytest.raises(ArtifactError, match=words):
            model_config("m", Manifest.from_json(stated, where=""), profile=profile)
