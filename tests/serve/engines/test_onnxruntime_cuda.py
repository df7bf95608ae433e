"""ONNX Runtime on a GPU against ONNX Runtime on the processor, where there is a GPU; and what is said where not."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pst.errors import EngineError
from serve.decoding import Decoding
from serve.engines import Array, Shapes, open_engine
from serve.engines._onnxruntime_cuda import fused
from serve.engines._onnxruntime_providers import CPU, CUDA, TENSORRT, providers_of, with_graphs
from serve.engines.onnxruntime import OnnxRuntimeEngine

from ...decoders import make_decoder
from ...encoders import make_encoder

Exported = Callable[[str], Path]
on_gpu = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is not installed"
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """``exported("bert fp16 half")``: an artifact of a tiny model, a precision and a residual stream."""
    from export.pipeline import export

    made: dict[str, Path] = {}

    def make(what: str) -> Path:
        if what not in made:
            name, precision, residual = what.split()
            folder = tmp_path_factory.mktemp(name)
            if name == "gpt2":
                make_decoder(folder / "model", name)
            else:
                # With tables of fewer than 100 numbers ONNX Runtime computes on the processor, and records no graph.
                make_encoder(folder / "model", name, "classification", max_position_embeddings=130)
            export(folder / "model", folder / "artifact", precision=precision, residual=residual)
            made[what] = folder / "artifact"
        return made[what]

    return make


def _feeds(rows: int, tokens: int, *, padded: bool, seed: int) -> dict[str, Array]:
    ids = np.random.default_rng(seed).integers(5, 30, (rows, tokens))
    mask = np.ones_like(ids)
    if padded:
        mask[0, tokens // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@on_gpu
@pytest.mark.parametrize("what", ["bert fp32 fp32", "bert fp16 fp32", "bert fp16 half", "mpnet fp16 half"])
def test_a_gpu_gives_the_answers_of_the_processor(exported: Exported, what: str) -> None:
    folder, shapes = exported(what), Shapes(fixed=((4, 16),))
    with (
        open_engine(folder, engine="onnxruntime-cpu", threads=1) as exact,
        open_engine(folder, engine="onnxruntime-cuda", threads=1, shapes=shapes) as engine,
    ):
        assert isinstance(engine, OnnxRuntimeEngine)
        assert engine._fused is not None
        assert engine._fused.fused == 2
        for seed, (rows, tokens) in enumerate([(4, 16), (1, 7), (1, 7), (4, 16), (3, 24), (1, 7), (3, 24)]):
            for padded in (False, True):
                feeds = _feeds(rows, tokens, padded=padded, seed=seed)
                feeds = {name: feeds[name] for name in engine.inputs}
                given, expected = engine.infer(feeds)["logits"], exact.infer(feeds)["logits"]
                np.testing.assert_allclose(given, expected, atol=1e-4 if " fp32 " in what else 3e-2)
        if what.startswith("bert"):  # MPNet's distances between tokens may be computed on the processor
            for session in engine._fused._sessions.values():
                assert session.graphs  # nothing kept it from recording
                assert len(session._recorded) == 3


@on_gpu
@pytest.mark.parametrize("what", ["gpt2 fp32 fp32", "gpt2 fp16 half"])
def test_a_decoder_on_a_gpu(exported: Exported, what: str) -> None:
    folder, random = exported(what), np.random.default_rng(4)
    with (
        open_engine(folder, engine="onnxruntime-cpu", threads=1) as exact,
        open_engine(folder, engine="onnxruntime-cuda", threads=1) as engine,
    ):
        for lengths in ((5,), (9, 9, 9), (12, 3, 7)):
            prompts = [random.integers(4, 35, length).tolist() for length in lengths]
            decodings = [Decoding(each, pad_id=0) for each in (exact, engine)]
            expected, given = (decoding.join(prompts) for decoding in decodings)
            for _ in range(10):
                np.testing.assert_allclose(given, expected, atol=1e-3 if " fp32 " in what else 0.3)
                chosen = expected.argmax(axis=-1)
                expected, given = (decoding.step(chosen) for decoding in decodings)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize(("name", "words"), [("cuda", "CUDA"), ("cuda-tf32", "CUDA"), ("tensorrt", "TensorRT")])
def test_a_package_without_the_provider(bert_artifact: Path, name: str, words: str) -> None:
    with pytest.raises(EngineError, match=f"has no {words} provider; run: pip uninstall onnxruntime"):
        open_engine(bert_artifact, engine=f"onnxruntime-{name}")


def test_an_unknown_variant(bert_artifact: Path) -> None:
    with pytest.raises(EngineError, match="onnxruntime-rocm is not an engine; choose onnxruntime or one of"):
        open_engine(bert_artifact, engine="onnxruntime-rocm")


class _Installed:
    """What providers_of asks an onnxruntime-gpu for."""

    __version__ = "1.31.1"

    def get_available_providers(self) -> list[str]:
        return [TENSORRT, CUDA, CPU]


def test_options_of_the_providers(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = exported("bert fp16 half") / "model.onnx"
    assert providers_of(_Installed(), "", file=file) == [CPU]
    (name, options), last = providers_of(_Installed(), "cuda", file=file)
    assert (name, options["use_tf32"], last) == (CUDA, "0", CPU)
    assert providers_of(_Installed(), "cuda-tf32", file=file)[0][1]["use_tf32"] == "1"
    assert with_graphs([(CUDA, options), CPU]) == [(CUDA, options | {"enable_cuda_graph": "1"}), CPU]
    tensorrt, cuda, _ = providers_of(_Installed(), "tensorrt", file=file)
    assert (tensorrt[0], cuda[0]) == (TENSORRT, CUDA)
    assert (tensorrt[1]["trt_fp16_enable"], tensorrt[1]["trt_sparsity_enable"]) == ("True", "True")
    assert Path(tensorrt[1]["trt_engine_cache_path"]).is_relative_to(tmp_path / "sparse-pst")
    bare = tmp_path / "bare.onnx"
    bare.write_bytes(file.read_bytes())
    assert providers_of(_Installed(), "tensorrt", file=bare)[0][1]["trt_fp16_enable"] == "False"


def test_without_the_package_onnx(
    bert_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert fused(bert_artifact / "model.onnx", unpadded=True) is None
    assert "onnx is not installed" in capsys.readouterr().err
