"""The words in a torch engine's name, and which weights become 2:4 kernels; what runs them needs a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pst.errors import EngineError, ModelError
from pst.sparsify import prunable_weights
from serve.engines import Shapes, open_engine
from serve.engines._torch_sparse import NOT_HELD, WRONG_FORM, candidates, compress_
from serve.engines._torch_variant import parse_variant
from serve.engines.torch import TorchEngine

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def _feeds(rows: int, tokens: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(2).integers(5, 30, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize(
    ("text", "device", "name"),
    [
        ("", "", "torch-cpu"),
        ("auto", "", "torch-cpu"),
        ("cpu", "cpu", "torch-cpu"),
        ("compiled", "", "torch-cpu-compiled"),
        ("cuda", "cuda", "torch-cuda"),
        ("fp16", "cuda", "torch-cuda-fp16"),
        ("compiled-cuda-fp16", "cuda", "torch-cuda-fp16-compiled"),
        ("sparse", "cuda", "torch-cuda-sparse"),
        ("cuda-compiled-sparse", "cuda", "torch-cuda-sparse-compiled"),
        ("cuda-sparse-fp16", "cuda", "torch-cuda-sparse"),
    ],
)
def test_words_in_any_order(text: str, device: str, name: str) -> None:
    variant = parse_variant(text)
    assert variant.device == device
    assert variant.name(device or "cpu") == name
    assert parse_variant(variant.name(device or "cpu").removeprefix("torch-")).name(device or "cpu") == name


@pytest.mark.parametrize("text", ["gpu", "cuda-cuda", "cpu-cuda", "fp8", "cuda-trt", "autocuda"])
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(EngineError, match=f"torch-{text} is not an engine; choose torch"):
        parse_variant(text)


@pytest.mark.parametrize("text", ["cpu-fp16", "sparse-cpu"])
def test_half_precision_wants_a_gpu(text: str) -> None:
    with pytest.raises(EngineError, match="on a GPU alone"):
        parse_variant(text)


@without_gpu
@pytest.mark.parametrize("name", ["torch-cuda", "torch-fp16", "torch-sparse", "torch-cuda-compiled"])
def test_without_a_gpu(tiny_bert: Path, name: str) -> None:
    with pytest.raises(EngineError, match="no CUDA device"):
        open_engine(tiny_bert, engine=name)


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    from ...decoders import make_decoder

    with pytest.raises(ModelError, match=r"is a causal language model .*take its artifact"):
        open_engine(make_decoder(tmp_path / "lm", "gpt2"), engine="torch")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_model_that_does_not_compile(tiny_bert: Path) -> None:
    with open_engine(tiny_bert, engine="torch-cpu-compiled", threads=1) as engine:
        assert isinstance(engine, TorchEngine)

        def fault(**feeds: Any) -> None:
            raise torch._dynamo.exc.Unsupported("a reason")

        engine._model = fault
        with pytest.raises(EngineError, match=r"cannot compile the model \(a reason\); choose the engine torch-cpu\."):
            engine.infer(_feeds(1, 4))


def test_candidates_are_those_that_hold_2_4(sparse_model: Callable[..., Path], tiny_gpt2: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(sparse_model("2:4"))
    weights = prunable_weights(model)
    found, others = candidates(weights)
    assert [each.name for each in found] == [each.name for each in weights]
    assert not others
    with torch.no_grad():
        weights[3].weight[0, :3] = 1.0
    found, others = candidates(weights)
    assert len(found) == len(weights) - 1
    assert others == {weights[3].name: NOT_HELD}
    of_gpt2 = prunable_weights(AutoModelForSequenceClassification.from_pretrained(tiny_gpt2))
    assert candidates(of_gpt2) == ([], {each.name: WRONG_FORM for each in of_gpt2})


@without_gpu
def test_without_cusparselt(sparse_model: Callable[..., Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(sparse_model("2:4"))
    with pytest.raises(EngineError, match="no cuSPARSELt for this GPU"):
        compress_(torch, prunable_weights(model), where="model")


@on_gpu
def test_sparse_kernels_give_the_answers_of_dense_ones(
    tmp_path: Path, sparse_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sparse_model("2:4")
    with (
        open_engine(folder, engine="torch-cuda-fp16") as dense,
        open_engine(folder, engine="torch-cuda-sparse") as sparse,
    ):
        assert isinstance(sparse, TorchEngine)
        count = len(sparse.sparse_weights) + len(sparse.dense_weights)
        assert sparse.sparse_weights
        assert f"{len(sparse.sparse_weights)} of {count} prunable weights" in capsys.readouterr().err
        for shape in ((1, 4), (3, 9), (16, 32), (1, 4)):
            expected = dense.infer(_feeds(*shape))["logits"]
            np.testing.assert_allclose(sparse.infer(_feeds(*shape))["logits"], expected, atol=2e-2)


@on_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")  # advice, in torch
@pytest.mark.parametrize("name", ["torch-cuda-compiled", "torch-cuda-fp16-compiled"])
def test_compiled(tiny_bert: Path, name: str) -> None:
    shapes = Shapes(fixed=((2, 8), (4, 16)), others=False)
    with open_engine(tiny_bert, engine="torch-cpu") as exact, open_engine(tiny_bert, engine=name, shapes=shapes) as one:
        for shape in (*shapes.fixed, *shapes.fixed, *shapes.fixed):
            np.testing.assert_allclose(
                one.infer(_feeds(*shape))["logits"], exact.infer(_feeds(*shape))["logits"], atol=2e-2
            )
