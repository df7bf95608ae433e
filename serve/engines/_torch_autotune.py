"""Times each layer of a PyTorch model dense and in 2:4 kernels, as the model itself runs it, at the announced shapes.

A product is nn.functional.linear with the layer's own weight and bias, or the engine's operator with the compressed
one, whose algorithm is searched (_torch_sparse_linear.py). All weights of one shape are multiplied one after another,
so that they come from memory as in the model. What runs between the layers is left out; a sparse product's result lies
in columns, and what reads it next may take longer for that. pst bench --tune measures the whole model after this.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pst.errors import EngineError
from serve.bench.stopping import StopRule
from serve.engines import Shapes
from serve.engines._torch_products import GpuTimer
from serve.engines._torch_sparse import Compressed
from serve.engines._torch_sparse_linear import ALGORITHMS, operator
from serve.layers import LayerTimes, describe_layers
from serve.predict.products import Call, rounds, timed

ROUNDS = 60
Timer = Callable[[Callable[[], object]], Call]
"""From what launches products to what runs and times it."""


def autotune(
    torch: Any, found: Sequence[Compressed], *, shapes: Shapes, timer: Timer, where: str
) -> tuple[LayerTimes, ...]:
    """The times of all layers of *found*, by shape of the layer.

    Raises EngineError, naming *where*, where no shapes are announced, where PyTorch refuses a product, and where no
    layer is faster sparse.
    """
    if not shapes.fixed:
        raise EngineError(
            f"Which layers of {where} are faster sparse depends on the shapes, and none are announced; serve the "
            "folder that pst bench --tune wrote, or choose the engine torch-cuda-sparse."
        )
    try:
        layers = time_layers(torch, found, shapes=shapes.fixed, timer=timer)
    except RuntimeError as error:
        raise EngineError(
            f"A product of {where} cannot be timed ({str(error).splitlines()[0]}); choose the engine torch-cuda-fp16."
        ) from error
    if not any(each.is_sparse for each in layers):
        named = ", ".join(f"{batch}x{tokens}" for batch, tokens in shapes.fixed)
        raise EngineError(
            f"No layer of {where} is clearly faster sparse at {named}: {describe_layers(layers)}; choose the engine "
            "torch-cuda-fp16."
        )
    return layers


def time_layers(
    torch: Any, found: Sequence[Compressed], *, shapes: Sequence[tuple[int, int]], timer: Timer
) -> tuple[LayerTimes, ...]:
    """Dense and sparse in turn, at each of *shapes* (batch, tokens)."""
    groups: dict[tuple[int, int], list[Compressed]] = {}
    for each in found:
        outputs, inputs = each.dense.shape
        groups.setdefault((outputs, inputs), []).append(each)
    calls: dict[str, Call] = {}
    for size, group in groups.items():
        for batch, tokens in shapes:
            first = group[0].dense
            value = torch.randn((batch, tokens, size[1]), device=first.device, dtype=first.dtype)
            for kind, products in (("dense", _dense), ("sparse", _sparse)):
                with ALGORITHMS.searching():  # of the first products, before any is timed
                    calls[_name(size, (batch, tokens), kind)] = timer(products(torch, value, group))
    samples, _ = rounds(calls, StopRule(runs=ROUNDS, precision=0.0, budget_s=math.inf))
    return tuple(
        LayerTimes(
            outputs=size[0], inputs=size[1], weights=tuple(each.name for each in group),
            dense=_of(samples, size, shapes, "dense"), sparse=_of(samples, size, shapes, "sparse"),
        )
        for size, group in groups.items()
    )  # fmt: skip


def timer_of(torch: Any, *, compiled: bool) -> Timer:
    """The GPU's own time, as a CUDA graph has it; of a model that is not *compiled*, with the host's launches."""
    if compiled:
        return GpuTimer(torch).call

    def wall_clock(run: Callable[[], object]) -> Call:
        def call() -> None:
            run()
            torch.cuda.synchronize()

        return timed(call)

    return wall_clock


def _dense(torch: Any, value: Any, group: Sequence[Compressed]) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for each in group:
                torch.nn.functional.linear(value, each.dense, each.bias)

    return run


def _sparse(torch: Any, value: Any, group: Sequence[Compressed]) -> Callable[[], None]:
    multiply = operator(torch)

    def run() -> None:
        with torch.inference_mode():
            for each in group:
                multiply(each.sparse, value, each.bias, each.dense.shape[0])

    return run


def _name(size: tuple[int, int], shape: tuple[int, int], kind: str) -> str:
    return f"{size} {shape} {kind}"


def _of(
    samples: Mapping[str, Sequence[float]], size: tuple[int, int], shapes: Sequence[tuple[int, int]], kind: str
) -> dict[str, tuple[float, ...]]:
    return {f"{shape[0]}x{shape[1]}": tuple(samples[_name(size, shape, kind)]) for shape in shapes}
