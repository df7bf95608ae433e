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
from serve.engines._torch_sparse import (
    NOT_CHOSEN,
    NOT_HELD,
    WRONG_FORM,
    Compressed,
    candidates,
    compress,
    install_,
    known_dense,
)
from serve.engines._torch_sparse_linear import linear_class
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
        ("autotune-sparse", "cuda", "torch-cuda-sparse-autotune"),
        ("cuda-sparse-autotune-compiled", "cuda", "torch-cuda-sparse-autotune-compiled"),
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


def test_only_sparse_has_something_to_tune() -> None:
    with pytest.raises(EngineError, match="torch-cuda-autotune has nothing to tune; choose torch-cuda-sparse-autotune"):
        parse_variant("cuda-autotune")


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
        compress(torch, prunable_weights(model), where="model")


def _compressed(*names: str) -> list[Compressed]:
    """Layers in which a weight of zeros stands for the compressed one."""
    layers = {name: torch.nn.Linear(4, 8) for name in names}
    return [
        Compressed(name=name, module=each, dense=each.weight.detach(), sparse=torch.zeros(8, 4))
        for name, each in layers.items()
    ]


def test_what_stays_dense_keeps_its_weight(capsys: pytest.CaptureFixture[str]) -> None:
    found = _compressed("a", "b", "c")
    result = install_(torch, found, {"d": WRONG_FORM, **known_dense(found, ["c", "a"], where="model")})
    assert result.sparse == ["a", "c"]
    assert result.dense == {"d": WRONG_FORM, "b": NOT_CHOSEN}
    assert [each.module.weight is not None and not each.module.weight.any() for each in found] == [True, False, True]
    assert [type(each.module) is linear_class(torch) for each in found] == [True, False, True]
    assert torch.equal(found[1].module.weight, found[1].dense)
    assert "2 of 4 prunable weights run in cuSPARSELt's 2:4 kernels; 2 stay dense (d: " in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "named"), [(["a", "z"], "z"), ([], "none")])
def test_a_choice_of_another_model(chosen: list[str], named: str) -> None:
    with pytest.raises(EngineError, match=rf"2:4 kernels \({named}\); run pst bench --tune again"):
        known_dense(_compressed("a"), chosen, where="model")


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
@pytest.mark.parametrize("compiled", ["", "-compiled"])
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")  # advice, in torch
def test_layers_run_as_they_were_chosen(sparse_model: Callable[..., Path], compiled: str) -> None:
    folder, name = sparse_model("2:4"), f"torch-cuda-sparse-autotune{compiled}"
    with pytest.raises(EngineError, match="depends on the shapes, and none are announced; serve the folder"):
        open_engine(folder, engine=name)
    with open_engine(folder, engine="torch-cuda-sparse") as all_sparse:
        assert isinstance(all_sparse, TorchEngine)
        weights = sorted(all_sparse.sparse_weights)
    shapes = Shapes(fixed=((16, 32),))
    try:
        with open_engine(folder, engine=name, shapes=shapes) as measured:
            assert isinstance(measured, TorchEngine)
            chosen = {weight for each in measured.layer_times if each.is_sparse for weight in each.weights}
            assert measured.sparse_weights == chosen
    except EngineError as error:  # layers so small are seldom faster
        assert "is clearly faster sparse at 16x32: " in str(error)  # noqa: PT017 - which of the two, the GPU decides
    known = Shapes(fixed=((16, 32),), faster_sparse=tuple(weights[:2]))
    with (
        open_engine(folder, engine="torch-cuda-fp16") as dense,
        open_engine(folder, engine=name, shapes=known) as one,
    ):
        assert isinstance(one, TorchEngine)
        assert one.layer_times == ()
        assert sorted(one.sparse_weights) == weights[:2]
        for shape in ((16, 32), (16, 32), (16, 32), (16, 32), (3, 9)):
            expected = dense.infer(_feeds(*shape))["logits"]
            np.testing.assert_allclose(one.infer(_feeds(*shape))["logits"], expected, atol=2e-2)


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
