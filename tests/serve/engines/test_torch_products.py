"""PyTorch's products on a GPU, where there is one; and what needs none: shapes, masks, checks, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pst.errors import EngineError
from pst.patterns import parse_pattern
from serve.engines._torch_products import (
    GpuTimer,
    TorchTwoOfFour,
    check_product,
    fits,
    has_cusparselt,
    load_torch,
    random_pair,
    shapes_of,
)
from serve.predict.products import open_products, random_weights
from serve.predict.run import predict

GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not (GPU and has_cusparselt(torch)), reason="needs an NVIDIA GPU with cuSPARSELt")


def test_shapes_are_those_of_the_weights(tiny_bert: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_bert / "model.safetensors", framework="np") as file:
        stored = {name.removeprefix("bert."): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    found = shapes_of(tiny_bert)
    assert {name: shape for name, shape in found.items() if ".layer." in name} == {
        name: shape for name, shape in stored.items() if ".layer." in name
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_random_pair_is_two_of_four(dtype: torch.dtype) -> None:
    dense, zeroed = random_pair(torch, 64, 128, dtype, device="cpu")
    assert dense.dtype == zeroed.dtype == dtype
    kept = zeroed != 0
    assert torch.equal(zeroed[kept], dense[kept])
    assert kept.float().mean() == pytest.approx(0.5, abs=0.01)
    assert parse_pattern("2:4").holds(kept.float().numpy(), axis=1)
    groups = {tuple(group) for group in kept.reshape(-1, 4).tolist()}
    assert len({group for group in groups if sum(group) == 2}) == 6  # a number that is drawn as 0 leaves fewer


def test_a_wrong_product_is_refused() -> None:
    expected = torch.ones(4, 8)
    check_product(expected + 0.01, expected)
    with pytest.raises(EngineError, match=r"differs from cuBLAS's by 100\.0%"):
        check_product(torch.zeros(4, 8), expected)
    with pytest.raises(EngineError, match="differs"):
        check_product(torch.full((4, 8), float("nan")), expected)
    with pytest.raises(EngineError, match="has the shape"):
        check_product(expected.T, expected)


def test_shapes_that_the_kernel_takes() -> None:
    assert fits(768, 3072)
    assert not fits(768, 2)
    assert not fits(100, 64)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(tiny_bert: Path) -> None:
    for wanted in (load_torch, lambda: open_products(tiny_bert, engine="torch-cuda", threads=1)):
        with pytest.raises(EngineError, match="PyTorch sees no NVIDIA GPU"):
            wanted()


@gpu
@pytest.mark.parametrize("tokens", [1, 128, 1000])
def test_two_of_four_is_right_and_timed(tokens: int) -> None:
    _, zeroed = random_pair(torch, 256, 512, torch.float16)
    product = TorchTwoOfFour(torch, GpuTimer(torch), [zeroed])
    assert 0 < product.at(tokens)() < 100
    assert product.kernel.startswith("cuSPARSELt, algorithm ")


@gpu
def test_a_prediction_on_a_gpu(tiny_bert: Path) -> None:
    found = predict(tiny_bert, pattern="2:4", shapes=[(2, 32)], engine="torch-cuda", budget_s=5)
    (each,) = found.shapes
    assert found.engine == "torch-cuda"
    assert each.model_ms > 0
    assert any(layer.sparse_kernel for layer in each.layers)
    assert np.isfinite(each.speedup.ratio)


@gpu
def test_dense_products_with_zeros_are_dense_products() -> None:
    with open_products(Path(), engine="torch-cuda", threads=1) as products:
        weights = random_weights(256, 512, 2)
        assert products.sparse("unstructured", weights) is None
        assert products.dense(weights).at(64)() > 0
