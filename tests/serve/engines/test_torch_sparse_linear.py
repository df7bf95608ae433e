"""The operator for 2:4 weights: everything but cuSPARSELt's kernel, for which a dense product stands on a processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from serve.engines import Shapes, _torch_sparse_linear, open_engine
from serve.engines._torch_products import has_cusparselt, random_pair
from serve.engines._torch_sparse_linear import DEFAULT, Algorithms, linear_class, operator
from serve.engines._torch_variant import Variant
from serve.engines.torch import TorchEngine

gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cusparselt(torch)), reason="needs an NVIDIA GPU with cuSPARSELt"
)
SHAPES = [(1, 4, 32), (3, 9, 32), (16, 32), (2, 8, 32), (1, 1, 32)]


@pytest.fixture
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A packed weight is the weight; the algorithms that products were asked for, and the tokens of each."""
    asked = []

    def product(torch: Any, packed: Tensor, value: Tensor, bias: Tensor | None, algorithm: Any) -> Tensor:
        asked.append((algorithm, value.shape[1]))
        found = packed @ value
        return found if bias is None else found + bias[:, None]

    monkeypatch.setattr(_torch_sparse_linear, "product", product)
    monkeypatch.setattr(_torch_sparse_linear, "ALGORITHMS", Algorithms())
    return asked


def _layer(bias: bool = True) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """A layer, and what it is with a packed weight."""
    torch.manual_seed(3)
    dense, packed = torch.nn.Linear(32, 64, bias=bias), torch.nn.Linear(32, 64, bias=bias)
    packed.load_state_dict(dense.state_dict())
    packed.requires_grad_(False).__class__ = linear_class(torch)
    return dense, packed


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_linear_layer(on_the_processor: list[tuple[Any, ...]], shape: tuple[int, ...], bias: bool) -> None:
    dense, packed = _layer(bias)
    value = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(packed(value), dense(value))
    ((algorithm, tokens),) = on_the_processor
    assert algorithm == DEFAULT
    assert tokens % 16 == 0
    assert 0 <= tokens - value.numel() // 32 < 16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_torch_compile_is_told_of_it(on_the_processor: list[tuple[Any, ...]], shape: tuple[int, ...]) -> None:
    _, packed = _layer()
    arguments = (packed.weight, torch.randn(shape), packed.bias, 64)
    torch.library.opcheck(operator(torch), arguments, test_utils=("test_schema", "test_faketensor"))
    assert packed(arguments[1]).stride()[-1] >= 16  # in columns


def test_a_value_in_columns_is_taken_as_it_is(on_the_processor: list[tuple[Any, ...]]) -> None:
    """What an activation makes of another such layer's result."""
    _, packed = _layer()
    back = torch.nn.Linear(64, 32)
    with torch.inference_mode():
        value = torch.nn.functional.gelu(packed(torch.randn(2, 16, 32)))
        assert value.stride() == (16, 1, 32)
        found = operator(torch)(back.weight, value, back.bias, 32)
        torch.testing.assert_close(found, back(value))
    assert len(on_the_processor) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled(on_the_processor: list[tuple[Any, ...]]) -> None:
    dense, packed = _layer()
    value = torch.randn(2, 9, 32)
    with torch.inference_mode():
        found = torch.compile(lambda value: torch.nn.functional.gelu(packed(value)) * 2, backend="aot_eager")(value)
        torch.testing.assert_close(found, torch.nn.functional.gelu(dense(value)) * 2)


def _search(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[int, ...]]:
    searched = []

    def mm_search(packed: Tensor, value: Tensor, *_: Any) -> Any:
        searched.append(tuple(value.shape))
        if isinstance(result, Exception):
            raise result
        return result

    class CuSparseLt:
        pass

    library: Any = CuSparseLt()
    library.mm_search = mm_search
    monkeypatch.setattr(torch._C, "_cusparselt", library, raising=False)
    return searched


def test_a_size_is_searched_once_and_where_it_is_asked_for(
    on_the_processor: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = _search(monkeypatch, (7, 2, 1, 40))
    _, packed = _layer()
    with torch.inference_mode():
        packed(torch.randn(2, 16, 32))
        with _torch_sparse_linear.ALGORITHMS.searching():
            for tokens in (16, 16, 24):
                packed(torch.randn(2, tokens, 32))
        assert searched == [(32, 32), (32, 48)]
        on_the_processor.clear()
        for tokens in (16, 24, 8):
            packed(torch.randn(2, tokens, 32))
    assert on_the_processor == [((7, 2, 1), 32), ((7, 2, 1), 48), (DEFAULT, 16)]
    assert len(searched) == len(_torch_sparse_linear.ALGORITHMS) == 2


def test_a_search_that_fails_leaves_the_default(
    on_the_processor: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = _search(monkeypatch, RuntimeError("CUDA error: internal error"))
    _, packed = _layer()
    with torch.inference_mode(), _torch_sparse_linear.ALGORITHMS.searching():
        packed(torch.randn(2, 16, 32))
        packed(torch.randn(2, 16, 32))
    assert len(searched) == 1
    assert on_the_processor == [(DEFAULT, 32)] * 2


def test_an_algorithm_that_computes_something_else_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    _search(monkeypatch, (7, 2, 1, 40))
    algorithms = Algorithms()

    def product(torch: Any, packed: Tensor, value: Tensor, bias: Any, algorithm: Any) -> Tensor:
        return (packed @ value) * (1.0 if algorithm == DEFAULT else 1.1)

    monkeypatch.setattr(_torch_sparse_linear, "product", product)
    with algorithms.searching():
        assert algorithms.of(torch, torch.randn(64, 32), torch.randn(32, 16), None, 64) == DEFAULT


@gpu
@pytest.mark.parametrize("searches", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape: tuple[int, ...], searches: bool) -> None:
    weight = random_pair(torch, 64, 32, torch.float16)[1]
    packed, bias = torch._cslt_compress(weight), torch.randn(64, dtype=torch.float16, device="cuda")
    value = torch.randn(shape, dtype=torch.float16, device="cuda")
    expected = torch.nn.functional.linear(value, weight, bias)
    with torch.inference_mode():
        if searches:
            with _torch_sparse_linear.ALGORITHMS.searching():
                operator(torch)(packed, value, bias, 64)
        torch.testing.assert_close(operator(torch)(packed, value, bias, 64), expected, atol=1e-2, rtol=1e-2)
    torch.library.opcheck(operator(torch), (packed, value, bias, 64), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("compiled", "fixed"), [(False, ((2, 16), (1, 8))), (True, ((2, 16),))])
def test_a_model_whose_layers_are_all_of_them(
    on_the_processor: list[tuple[Any, ...]],
    sparse_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    compiled: bool,
    fixed: tuple[tuple[int, int], ...],
) -> None:
    """The engine as on a GPU, but for the kernel, the type of the numbers and the device."""
    folder = sparse_model("2:4")
    with open_engine(folder, engine="torch-cpu", threads=1) as dense:
        searched = _search(monkeypatch, (7, 2, 1, 40))
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
        monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
        monkeypatch.setattr("serve.engines.torch.ALGORITHMS", _torch_sparse_linear.ALGORITHMS)
        asked = Variant(device="cpu", half=False, compiled=compiled, sparse=True, autotune=False)
        monkeypatch.setattr("serve.engines.torch.parse_variant", lambda _: asked)
        with TorchEngine(folder, variant="sparse", threads=1, shapes=Shapes(fixed=fixed)) as engine:
            assert len(engine.sparse_weights) == 12
            tokens = {-(-rows * length // 16) * 16 for rows, length in fixed}
            assert set(searched) == {(inputs, filled) for inputs in (32, 64) for filled in tokens}
            on_the_processor.clear()
            for batch, length in fixed if compiled else (*fixed, (3, 5)):
                ids = np.random.default_rng(2).integers(5, 30, (batch, length))
                feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
                expected = dense.infer(feeds)["logits"]
                np.testing.assert_allclose(engine.infer(feeds)["logits"], expected, atol=1e-5)
            asked_for = {algorithm for algorithm, filled in on_the_processor if filled in tokens}
            assert asked_for == {(7, 2, 1)}
