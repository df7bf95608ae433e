"""Timing layers dense and sparse on the processor, where weights of another value stand for compressed ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pst.errors import EngineError
from pst.sparsify import PrunableWeight
from serve.engines import Shapes, _torch_sparse_linear
from serve.engines._torch_autotune import ROUNDS, Timer, autotune, time_layers, timer_of
from serve.engines._torch_products import has_cusparselt, random_pair
from serve.engines._torch_sparse import Compressed, compress
from serve.predict.products import Call, timed

SHAPES = ((1, 4), (2, 8))
gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cusparselt(torch)), reason="needs an NVIDIA GPU with cuSPARSELt"
)


@pytest.fixture(autouse=True)
def on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(_torch_sparse_linear, "product", lambda torch, packed, value, bias, _: packed @ value)


def compressed(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Compressed:
    module = torch.nn.Linear(inputs, outputs, bias=bias)
    return Compressed(name=name, module=module, dense=module.weight.detach(), sparse=torch.zeros(outputs, inputs))


FOUND = [compressed("a", 8, 16), compressed("b", 16, 8), compressed("c", 8, 16, bias=False)]


def test_layers_of_one_shape_together_at_each_announced_shape() -> None:
    layers = time_layers(torch, FOUND, shapes=SHAPES, timer=timed)
    assert [(each.shape, each.weights) for each in layers] == [("8 x 16", ("a", "c")), ("16 x 8", ("b",))]
    for each in layers:
        for samples in (each.dense, each.sparse):
            assert list(samples) == ["1x4", "2x8"]
            assert {len(times) for times in samples.values()} == {ROUNDS}
            assert min(min(times) for times in samples.values()) > 0


def says(monkeypatch: pytest.MonkeyPatch, milliseconds: Callable[[tuple[int, ...], bool], float]) -> Timer:
    """A timer by which a product takes ``milliseconds(the weight's shape, whether it is the compressed one)``."""
    linear, now = torch.nn.functional.linear, [0.0]

    def dense(value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        now[0] += milliseconds(tuple(weight.shape), False)
        return linear(value, weight, bias)

    def sparse(torch: Any, packed: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
        now[0] += milliseconds(tuple(packed.shape), True)
        return packed @ value

    monkeypatch.setattr(torch.nn.functional, "linear", dense)
    monkeypatch.setattr(_torch_sparse_linear, "product", sparse)

    def timer(run: Callable[[], object]) -> Call:
        def call() -> float:
            before = now[0]
            run()
            return now[0] - before

        return call

    return timer


def test_what_is_faster_sparse_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = says(monkeypatch, lambda shape, sparse: 0.5 if sparse and shape == (8, 16) else 1.0)
    layers = autotune(torch, FOUND, shapes=Shapes(fixed=SHAPES), timer=timer, where="model")
    assert [(each.shape, each.is_sparse) for each in layers] == [("8 x 16", True), ("16 x 8", False)]
    assert [each.speedup.ratio for each in layers] == [2.0, 1.0]
    assert set(layers[0].dense["1x4"]) == {2.0}  # two layers


def test_where_no_layer_is_faster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = says(monkeypatch, lambda shape, sparse: 2.0 if sparse else 1.0)
    words = (
        r"No layer of model is clearly faster sparse at 1x4, 2x8: 8 x 16 dense \(0\.50×\), 16 x 8 dense \(0\.50×\); "
    )
    with pytest.raises(EngineError, match=words + "choose the engine torch-cuda-fp16"):
        autotune(torch, FOUND, shapes=Shapes(fixed=SHAPES), timer=timer, where="model")


def test_a_product_that_is_refused_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("CUDA out of memory\nmore")

    monkeypatch.setattr(torch.nn.functional, "linear", refused)
    with pytest.raises(EngineError, match=r"A product of model cannot be timed \(CUDA out of memory\); choose"):
        autotune(torch, FOUND, shapes=Shapes(fixed=SHAPES), timer=timed, where="model")


def test_without_shapes_it_does_not_guess() -> None:
    with pytest.raises(EngineError, match=r"depends on the shapes, and none are announced; serve the folder"):
        autotune(torch, FOUND, shapes=Shapes(), timer=timed, where="model")


@gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled: bool) -> None:
    module = torch.nn.Linear(512, 256, dtype=torch.float16, device="cuda")
    module.weight = torch.nn.Parameter(random_pair(torch, 256, 512, torch.float16)[1])
    one, _ = compress(torch, [PrunableWeight(name="a", module=module, axis=1)], where="model")
    (layer,) = time_layers(torch, one, shapes=SHAPES, timer=timer_of(torch, compiled=compiled))
    assert all(0 < time < 100 for samples in (layer.dense, layer.sparse) for each in samples.values() for time in each)
