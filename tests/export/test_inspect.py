"""What inspect reports, against brute force and against files that this project did not make."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from export.inspect import Inspection, inspect
from export.measure import BLOCKS, N_M, find_patterns
from pst.errors import ArtifactError, ModelError, PSTError

from .conftest import Artifact, graph, matmul_model, save, two_four


def row(inspection: Inspection, name: str) -> Any:
    return next(weight for weight in inspection.weights if weight.name == name)


# Patterns -------------------------------------------------------------------------------------------------------------


def brute_force(weight: "np.ndarray[Any, Any]", axis: int) -> set[str]:
    """Every definition spelled out entry by entry, on outputs x inputs."""
    w = weight if axis == 1 else weight.T
    outputs, inputs = w.shape
    if (w != 0).all():
        return set()
    found = set()
    for spec in N_M:
        n, m = (int(part) for part in spec.split(":"))
        groups = [w[i, j : j + m] for i in range(outputs) for j in range(0, inputs, m)]
        if all(len(group) == m and sum(x != 0 for x in group) <= n for group in groups):
            found.add(spec)
    for spec in BLOCKS:
        r, c = (int(part) for part in spec.removeprefix("block:").split("x"))
        tiles = [w[i : i + r, j : j + c] for i in range(0, outputs, r) for j in range(0, inputs, c)]
        if all(tile.shape == (r, c) and ((tile == 0).all() or (tile != 0).all()) for tile in tiles):
            found.add(spec)
    zero_rows = {i for i in range(outputs) if not w[i].any()}
    zero_columns = {j for j in range(inputs) if not w[:, j].any()}
    zeros = [(i, j) for i in range(outputs) for j in range(inputs) if w[i, j] == 0]
    if all(i in zero_rows for i, _ in zeros):
        found.add("rows")
    if all(j in zero_columns for _, j in zeros):
        found.add("columns")
    return found or {"unstructured"}


def examples() -> dict[str, "np.ndarray[Any, Any]"]:
    """Float weights, outputs x inputs."""
    random = np.random.default_rng(0)

    def full(rows: int = 64, columns: int = 16) -> "np.ndarray[Any, Any]":
        return random.standard_normal((rows, columns)).astype(np.float32) + 9

    one_four, tiles, tall, row_, column = full(), full(), full(), full(), full()
    one_four[:, np.arange(16) % 4 != 2] = 0
    tiles[4:8, 8:12] = 0
    tall[32:, 3] = 0
    row_[5] = 0
    column[:, 7] = -0.0
    unstructured = full() * (random.random((64, 16)) < 0.5)
    four_eight = full()
    four_eight.reshape(64, 2, 8)[..., :4] = 0
    return {
        "dense": full(), "2:4": two_four(64, 16), "1:4": one_four, "4:8": four_eight, "tiles": tiles, "tall": tall,
        "row": row_, "column": column, "unstructured": unstructured, "all zero": np.zeros((64, 16), np.float32),
        "not divisible": two_four(6, 8)[:, :6], "2:4 but for one": np.where(np.arange(1024).reshape(64, 16) == 1000, 1,
                                                                              two_four(64, 16, seed=3)) + 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", examples())
@pytest.mark.parametrize("axis", [0, 1])
def test_patterns_against_brute_force(name: str, axis: int) -> None:
    weight = examples()[name] if axis == 1 else examples()[name].T
    assert set(find_patterns(weight != 0, axis=axis)) == brute_force(weight, axis)


def test_patterns_are_told_apart() -> None:
    found = {name: find_patterns(weight != 0, axis=1) for name, weight in examples().items()}
    assert found["dense"] == ()
    assert found["2:4"][:2] == ("2:4", "4:8")
    assert found["1:4"][:3] == ("1:4", "2:4", "4:8")
    assert found["4:8"][0] == "4:8"
    assert found["tiles"] == ("block:4x4", "block:1x4")
    assert found["tall"] == ("block:32x1",)
    assert "rows" in found["row"]
    assert "columns" in found["column"]
    assert found["unstructured"] == ("unstructured",)
    assert find_patterns(examples()["2:4"] != 0, axis=0) == ("unstructured",)


# Files ----------------------------------------------------------------------------------------------------------------


def test_hugging_face_folder(sparse_model: Callable[..., Path]) -> None:
    folder = sparse_model("2:4", 0.5)
    found = inspect(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {weight.name for weight in found.weights} == linears
    for weight in found.weights:
        assert weight.shape == tuple(state[weight.name].shape)
        assert (weight.axis, weight.density) == (1, float((state[weight.name] != 0).double().mean()))
        assert weight.patterns == (("2:4", "4:8") if "encoder" in weight.name else ())
        stored = state[weight.name].numpy().tobytes()
        assert weight.zstd_bytes == len(zstandard.compress(stored, 3))
        kept = int((state[weight.name] != 0).sum())
        assert weight.sparse_bytes == min(len(stored), kept * 12)
    totals = found.totals
    assert (found.kind, found.model_type) == ("model folder", "bert")
    assert totals.parameters == sum(tensor.numel() for tensor in state.values())
    assert totals.zeros == sum(int((tensor == 0).sum()) for tensor in state.values())
    assert totals.dense_bytes == 4 * totals.parameters
    assert (totals.prunable_parameters, totals.prunable_density) == (16384, 0.5)
    assert totals.two_four_bytes == totals.dense_bytes - 16384 * 4 + 16384 * 2 + 16384 // 8
    assert totals.bitmask_bytes == totals.dense_bytes - 16384 * 4 + 16384 * 2 + 16384 // 8


def test_artifact_agrees_with_its_model(artifact: Artifact, sparse_model: Callable[..., Path]) -> None:
    model, exported = inspect(sparse_model("2:4", 0.5)), inspect(artifact("2:4", 0.5))
    assert exported.kind == "artifact folder"
    assert inspect(artifact("2:4", 0.5) / "model.onnx").weights == exported.weights
    for weight in exported.weights:
        original = row(model, weight.name)
        for field in ("density", "patterns", "zero_rows", "zero_columns", "prunable", "bitmask_bytes"):
            assert getattr(weight, field) == getattr(original, field)
        assert original.shape[original.axis] == weight.shape[weight.axis]
    assert exported.totals.prunable_density == model.totals.prunable_density == 0.5


def test_run_folder(sparse_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(sparse_model("2:4", 0.5), tmp_path / "model")
    found = inspect(tmp_path)
    assert (found.kind, len(found.weights)) == ("run folder", 14)


def test_gpt2_is_summed_over_axis_0(tiny_gpt2: Path, tmp_path: Path) -> None:
    axes = {weight.name: weight.axis for weight in inspect(tiny_gpt2).weights}
    assert axes.pop("score.weight") == 1
    assert set(axes.values()) == {0}
    shutil.copyfile(tiny_gpt2 / "model.safetensors", tmp_path / "bare.safetensors")
    bare = inspect(tmp_path / "bare.safetensors")
    assert {weight.name: weight.axis for weight in bare.weights} == {**axes, "score.weight": 1}
    assert (bare.kind, bare.model_type) == ("safetensors file", None)


def test_linear_c_attn_is_summed_over_axis_1(tmp_path: Path) -> None:
    save_file({"h.0.attn.c_attn.weight": torch.ones(24, 8)}, tmp_path / "m.safetensors")
    assert inspect(tmp_path / "m.safetensors").weights[0].axis == 1


def test_sharded_folder(sparse_model: Callable[..., Path], tmp_path: Path) -> None:
    source = sparse_model("2:4", 0.5)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = inspect(tmp_path)
    assert (found.weights, found.totals) == (inspect(source).weights, inspect(source).totals)

    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        inspect(tmp_path)
    save_file({"other": torch.ones(1)}, shard)
    with pytest.raises(ModelError, match="which its index lists"):
        inspect(tmp_path)
    shard.write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="lists no weights"):
        inspect(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_types(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, -0.0, 2.0**-6, -2.0], [1.0, 0.0, 0.0, -1.0]]).to(dtype)
    save_file({"layer.0.weight": weight, "ids": torch.arange(9)}, tmp_path / "m.safetensors")
    found = inspect(tmp_path / "m.safetensors")
    assert (found.weights[0].zeros, found.weights[0].patterns) == (4, ("2:4",))
    assert found.totals.parameters == 8
    assert found.totals.dense_bytes == 8 * weight.element_size()


def test_onnx_file_by_others(tmp_path: Path) -> None:
    path = save(matmul_model(two_four(8, 16).T.copy()), tmp_path / "theirs.onnx")
    (weight,) = inspect(path).weights
    assert (weight.name, weight.shape, weight.axis, weight.patterns) == ("W", (16, 8), 0, ("2:4", "4:8"))
    assert weight.prunable
    assert inspect(tmp_path).weights == (weight,)

    half = save(matmul_model(two_four(8, 16).T.astype(ml_dtypes.bfloat16)), tmp_path / "bf16.onnx")
    assert inspect(half).weights[0].dtype == "bfloat16"
    assert inspect(half).totals.dense_bytes == 256
    with pytest.raises(ArtifactError, match="holds 2 ONNX files"):
        inspect(tmp_path)


def test_onnx_with_external_data(tmp_path: Path) -> None:
    model = matmul_model(two_four(64, 64).T.copy())
    path = save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert inspect(path).weights[0].density == 0.5
    (tmp_path / "m.data").unlink()
    with pytest.raises(ArtifactError, match=r"m\.data, which is missing"):
        inspect(path)


# Output ---------------------------------------------------------------------------------------------------------------


def test_render_and_json(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    found = inspect(artifact("2:4", 0.5))
    plain, coloured = found.render(terminal=False), found.render(terminal=True)
    assert "\x1b" not in plain
    assert "\x1b" in coloured
    for text in (plain, coloured):
        assert "2:4, 4:8" in text
        assert "density 0.5000" in text
    value = json.loads(json.dumps(found.to_json()))
    assert value["weights"][0]["patterns"] == ["2:4", "4:8"]
    assert value["totals"]["prunable_density"] == 0.5
    assert io.StringIO(plain).readline().endswith("(artifact folder, bert)\n")


def test_needs_no_torch(artifact: Artifact, tiny_bert: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from export.inspect import inspect\n"
        "for path in sys.argv[1:]: inspect(Path(path))\n"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_bert), str(artifact("2:4", 0.5))]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(path: Path, match: str, error: type[PSTError] = ModelError) -> None:
    with pytest.raises(error, match=match):
        inspect(path)


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"layer.0.weight": torch.ones(4, 4)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, r"cut off|empty|not a safetensors file")
    path.write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    refused(path, "not a safetensors file")
    path.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    refused(path, "not a safetensors file")
    path.write_bytes(whole.replace(b"[4,4]", b"[4,5]"))
    refused(path, "not a safetensors file")
    path.write_bytes(whole.replace(b'"F32"', b'"F99"'))
    refused(path, "F99, a type that is not supported")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(path, "git lfs pull")


def test_what_is_not_a_model(tmp_path: Path) -> None:
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "is not a model")
    (tmp_path / "readme.txt").write_text("hello")
    refused(tmp_path / "readme.txt", r"neither a \.safetensors nor an \.onnx file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"holds no model\.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    refused(tmp_path, "a pickle that can run code")
    save_file({"ids": torch.arange(9)}, tmp_path / "model.safetensors")
    refused(tmp_path, "no floating-point weights")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not readable JSON")
    (tmp_path / "no.onnx").write_text("not protobuf at all")
    refused(tmp_path / "no.onnx", "not an ONNX file", ArtifactError)


def test_empty_onnx_weights_are_skipped(tmp_path: Path) -> None:
    model = graph(matmul_model(np.zeros((4, 0), np.float32)).graph.node, {"W": np.zeros((4, 0), np.float32)})
    refused(save(model, tmp_path / "m.onnx"), "no floating-point weights")


def test_damaged_artifact(artifact: Artifact, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact("2:4", 0.5), tmp_path / "copy")
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    refused(folder, "damaged or was changed", ArtifactError)
