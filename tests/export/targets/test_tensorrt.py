"""Plans: shapes, the cache, what each version is asked for, and real ones by TensorRT-RTX, which needs no GPU."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.manifest import Manifest, TensorInfo
from export.pipeline import export
from export.targets.tensorrt import (
    NO_GPU,
    Profile,
    build_plan,
    find_gpu,
    find_runtime,
    fixed_profile,
    parse_profile,
    plan_of,
)
from export.targets.tensorrt.profiles import run_profiles
from export.targets.tensorrt.versions import network_flags, set_flags, sparse_layers
from pst.errors import ArtifactError, ConfigError, EngineError
from pst.files import sha256
from tests.command_line import pst
from tests.decoders import make_decoder, prune
from tests.encoders import make_encoder
from tests.export.conftest import Artifact

PROFILE = parse_profile("1x1,4x16,8x64", max_length=64)


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")


@pytest.fixture
def mine(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy of the 2:4 artifact, to build plans in."""
    return shutil.copytree(artifact("2:4", 0.5), tmp_path / "artifact")


def test_profiles() -> None:
    assert Profile(smallest=(1, 1), usual=(4, 16), largest=(8, 64)) == PROFILE
    assert str(PROFILE) == "1x1,4x16,8x64"
    assert str(parse_profile(None, max_length=512)) == "1x1,8x128,32x512"
    assert str(parse_profile(None, max_length=64)) == "1x1,8x64,32x64"
    ids = TensorInfo(name="input_ids", dtype="int64", shape=("batch_size", "sequence_length"))
    mask = TensorInfo(name="m", dtype="int64", shape=("batch_size", "past_sequence_length + sequence_length"))
    past = TensorInfo(name="past", dtype="float32", shape=("batch_size", 2, "past_sequence_length", 16))
    assert PROFILE.shapes(ids) == ((1, 1), (4, 16), (8, 64))
    assert PROFILE.shapes(past) == ((1, 2, 0, 16), (4, 2, 16, 16), (8, 2, 64, 16))
    assert PROFILE.shapes(mask) == ((1, 1), (4, 32), (8, 128))


def test_profiles_for_the_shapes_of_a_run() -> None:
    def made(*shapes: tuple[int, int], others: bool = False, **options: Any) -> list[str]:
        options = {"cached": False} | options
        return [str(profile) for profile in run_profiles(shapes, others=others, max_length=64, **options)]

    assert made((1, 8), (4, 16), others=False) == ["1x8", "4x16"]
    assert made((1, 8), (1, 8), others=True) == ["1x8", "1x1,8x64,32x64"]
    assert made((64, 8), others=True) == ["64x8", "1x1,8x64,64x64"]  # no batch of up to 64 rows is without a profile
    assert made(others=False) == ["1x1,8x64,32x64"]
    assert made((2, 8), others=False, new_tokens=4) == ["2x8"]
    assert made((2, 8), others=True, cached=True, new_tokens=4) == ["2x8+0..0", "2x1+8..12", "1x1,8x64,32x64"]
    assert made((4, 16), (1, 8), (2, 32), spanned=True) == ["1x8,4x16,4x32"]
    assert made((4, 16), spanned=True) == ["4x16"]
    assert made((1, 8), (4, 8), cached=True, new_tokens=4, spanned=True) == ["1x8,4x8,4x8+0..0", "1x1,4x1,4x1+8..12"]
    past = TensorInfo(name="past", dtype="float32", shape=("batch_size", 2, "past_sequence_length", 16))
    mask = TensorInfo(name="m", dtype="int64", shape=("batch_size", "past_sequence_length + sequence_length"))
    step = fixed_profile((2, 1), past=(8, 10, 12))
    assert step.shapes(past) == ((2, 2, 8, 16), (2, 2, 10, 16), (2, 2, 12, 16))
    assert step.shapes(mask) == ((2, 9), (2, 11), (2, 13))
    assert step.is_fixed


@pytest.mark.parametrize(
    ("eligible", "chosen"),
    [
        (
            "(Sparsity) Layers eligible for sparse math: Conv_0, Conv_1 + Relu_2, MatMul_51",
            "(Sparsity) TRT inference plan picked sparse implementation for layers: Conv_1 + Relu_2",
        ),
        (
            "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: Conv_0, Conv_1 + Relu_2, MatMul_51",
            "(Sparsity) Chose 1 layer(s) using sparse tactics: Conv_1 + Relu_2",
        ),
    ],
)
def test_what_a_builder_says_of_sparsity(eligible: str, chosen: str) -> None:
    everything = ["Conv_0", "Conv_1 + Relu_2", "MatMul_51"]
    assert sparse_layers([eligible, chosen, eligible, chosen]) == (everything, ["Conv_1 + Relu_2"])
    assert sparse_layers([eligible, chosen.partition(":")[0] + ":"]) == (everything, [])
    assert sparse_layers(["(Sparsity) Found 39 layer(s) eligible to use sparse tactics"]) == ([], [])
    assert sparse_layers([]) == ([], [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8x128", "is not three shapes"),
        ("1x1,8,32x32", "is not three shapes"),
        ("1x1,8x8,32xlong", "is not three shapes"),
        ("1x1,8x8,4x64", "does not grow"),
        ("0x1,8x8,9x9", "does not grow"),
        ("1x1,8x8,9x65", "beyond the model's 64 tokens"),
    ],
)
def test_profiles_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_profile(text, max_length=64)


def version(*, strongly_typed: bool, flags: tuple[str, ...]) -> Any:
    """What of a version's module decides how it is asked: stands for those that cannot be installed here."""
    creation = {"EXPLICIT_BATCH": 0} | ({"STRONGLY_TYPED": 1} if strongly_typed else {})
    return SimpleNamespace(
        __name__="tensorrt", __version__="0", NetworkDefinitionCreationFlag=SimpleNamespace(**creation),
        BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trt", "network", "fp16"),
    [
        (version(strongly_typed=False, flags=("SPARSE_WEIGHTS", "FP16")), 1, ["SPARSE_WEIGHTS", "FP16"]),  # 8.6
        (version(strongly_typed=True, flags=("SPARSE_WEIGHTS", "FP16", "BF16")), 2, ["SPARSE_WEIGHTS"]),  # 10
        (version(strongly_typed=True, flags=("SPARSE_WEIGHTS",)), 2, ["SPARSE_WEIGHTS"]),  # 11
    ],
    ids=["8.6", "10", "11"],
)
def test_what_each_version_is_asked_for(trt: Any, network: int, fp16: list[str], artifact: Artifact) -> None:
    manifest = Manifest.load(artifact("2:4", 0.5))
    asked: list[str] = []
    config = SimpleNamespace(set_flag=asked.append)
    assert network_flags(trt) == network
    set_flags(trt, config, manifest, sparse=False)
    assert asked == []
    half = Manifest.from_json(manifest.to_json() | {"precision": "fp16"}, where="")
    set_flags(trt, config, half, sparse=True)
    assert asked == fp16


def test_a_half_type_that_a_version_does_not_have_is_refused(artifact: Artifact) -> None:
    half = Manifest.from_json(Manifest.load(artifact("2:4", 0.5)).to_json() | {"precision": "bf16"}, where="")
    trt = version(strongly_typed=False, flags=("SPARSE_WEIGHTS", "FP16"))
    with pytest.raises(EngineError, match="has no bf16; export with --precision fp16"):
        set_flags(trt, SimpleNamespace(set_flag=print), half, sparse=False)


def test_a_runtime_that_is_missing_says_what_to_install(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="no_such_runtime is not installed"):
        find_runtime("no_such_runtime")
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = pst("export", tiny_bert, "--format", "tensorrt", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "TensorRT is not installed, so that no plan can be built; install it: pip install tensorrt" in outcome.err
    assert not (tmp_path / "out").exists()


def test_plans_are_built_once(rtx: Any, mine: Path) -> None:
    plan = plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE], target="SM86").path
    assert plan.parent == mine / "plans"
    record = json.loads(plan.with_suffix(".json").read_text())
    manifest = Manifest.load(mine)  # the cache is no part of what is verified
    assert record | {"sha256": "", "bytes": 0, "seconds": 0} == {
        "model": manifest.files["model.onnx"], "runtime": "tensorrt_rtx", "version": rtx.__version__,
        "gpu": find_gpu(), "target": "SM86", "profiles": ["1x1,4x16,8x64"], "flags": ["sparse_weights"],
        "shapes": [{"shapes": [[1, 1], [4, 16], [8, 64]], "past": None}],
        "sha256": "", "bytes": 0, "seconds": 0, "sparsity": [],
    }  # fmt: skip
    assert (record["sha256"], record["bytes"]) == (sha256(plan), plan.stat().st_size)
    before = plan.stat().st_mtime_ns
    assert plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE], target="SM86").path == plan
    assert plan.stat().st_mtime_ns == before
    plan.write_bytes(plan.read_bytes()[:-1])
    assert plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE], target="SM86").path == plan
    assert sha256(plan) == json.loads(plan.with_suffix(".json").read_text())["sha256"]
    others = [
        plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE], target="SM80").path,
        plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE], target="SM86", sparse=False).path,
    ]
    assert len({plan, *others}) == 3


def test_a_plan_of_several_profiles(rtx: Any, mine: Path) -> None:
    several = run_profiles([(1, 8), (4, 16)], others=True, max_length=64, cached=False)
    plan = plan_of(mine, runtime="tensorrt_rtx", profiles=several)
    assert plan.record["profiles"] == ["1x8", "4x16", "1x1,8x64,32x64"]
    assert plan.profiles == several
    assert [Profile.from_json(each.to_json()) for each in several] == list(several)
    assert plan_of(mine, runtime="tensorrt_rtx").profiles == several[2:]  # none of the two takes every shape
    assert plan_of(mine, runtime="tensorrt_rtx", profiles=several) == plan
    assert plan_of(mine, runtime="tensorrt_rtx", profiles=several[1:]) == plan  # it has those as well


@pytest.mark.skipif(find_gpu() != NO_GPU, reason="a GPU is here, for which plans are built")
def test_without_a_gpu_a_capability_is_chosen(rtx: Any, mine: Path) -> None:
    plan = plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE]).path
    assert json.loads(plan.with_suffix(".json").read_text())["target"] == "SM80"


@pytest.mark.parametrize(
    ("kind", "form", "precision"), [("gpt2", "gemm", "fp16"), ("llama", "gemm", "bf16"), ("bert", "auto", "fp16")]
)
def test_a_plan_in_half_precision(rtx: Any, tmp_path: Path, kind: str, form: str, precision: str) -> None:
    made = make_encoder(tmp_path / "model", kind, "classification") if kind == "bert" else None
    folder = prune(made or make_decoder(tmp_path / "model", kind), "2:4")
    export(folder, tmp_path / "out", linear_form=form, precision=precision)
    assert plan_of(tmp_path / "out", runtime="tensorrt_rtx", profiles=[PROFILE]).path.stat().st_size > 10_000


def test_what_a_runtime_refuses_is_said_in_its_words(rtx: Any, mine: Path) -> None:
    with pytest.raises(ConfigError, match="knows no compute capability 'SM1'; use one of"):
        plan_of(mine, runtime="tensorrt_rtx", target="SM1")
    manifest = Manifest.load(mine)
    (mine / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"does not read .*model\.onnx \(.+\); export again"):
        build_plan(mine / "model.onnx", manifest, trt=rtx, profiles=[PROFILE], target="SM80")
    with pytest.raises(ArtifactError, match="damaged"):
        plan_of(mine, runtime="tensorrt_rtx", profiles=[PROFILE])
    assert not (mine / "plans").exists()


def test_the_command_builds_a_plan_of_a_model_and_of_an_artifact(rtx: Any, mine: Path, tmp_path: Path) -> None:
    shapes = ("--profile", "1x1,2x8,2x16", "--compute-capability", "SM89")
    outcome = pst("export", mine, "--format", "tensorrt", "--output", tmp_path / "out", *shapes)
    assert outcome.code == 0, outcome.err
    (record,) = (tmp_path / "out" / "plans").glob("*.json")
    assert json.loads(record.read_text())["profiles"] == ["1x1,2x8,2x16"]
    assert Manifest.load(tmp_path / "out") == Manifest.load(mine)

    outcome = pst("export", mine, "--format", "tensorrt", "--output", tmp_path / "bad", "--profile", "1x1,2x8,2x999")
    assert outcome.code == 2
    assert "beyond the model's 64 tokens" in outcome.err
    assert "The ONNX artifact is whole, in" in outcome.err
    Manifest.load(tmp_path / "bad")

    outcome = pst("export", mine, "--precision", "fp16", "--output", tmp_path / "half")
    assert outcome.code == 2
    assert "is an artifact, of which --precision is decided" in outcome.err
    outcome = pst("export", mine, "--format", "tensorrrt", "--output", tmp_path / "typo")
    assert "Unknown format 'tensorrrt'; did you mean tensorrt?" in outcome.err
