"""Which layers run sparse, from times that the test says."""

import numpy as np
import pytest

from serve.layers import LayerTimes, dense_weights, describe_layers


def layer(dense: dict[str, float], sparse: dict[str, float], *, outputs: int = 64, noise: float = 0.001) -> LayerTimes:
    """Times in ms by shape, with *noise* relative to them."""
    random = np.random.default_rng(0)

    def samples(times: dict[str, float]) -> dict[str, tuple[float, ...]]:
        return {name: tuple(time * np.exp(noise * random.standard_normal(60))) for name, time in times.items()}

    return LayerTimes(
        outputs=outputs, inputs=32, weights=(f"{outputs}.a", f"{outputs}.b"), dense=samples(dense),
        sparse=samples(sparse),
    )  # fmt: skip


@pytest.mark.parametrize(("sparse", "chosen"), [(0.9, True), (0.975, True), (0.985, False), (1.0, False), (1.2, False)])
def test_clearly_faster_is_two_percent(sparse: float, chosen: bool) -> None:
    each = layer({"1x8": 1.0}, {"1x8": sparse})
    assert each.is_sparse is chosen
    assert each.speedup.ratio == pytest.approx(1 / sparse, rel=0.002)


def test_noise_is_no_reason() -> None:
    assert layer({"1x8": 1.0}, {"1x8": 0.9}).is_sparse
    assert not layer({"1x8": 1.0}, {"1x8": 0.9}, noise=1.0).is_sparse


def test_shapes_count_by_their_time() -> None:
    dense = {"1x8": 1.0, "8x128": 10.0}
    each = layer(dense, {"1x8": 1.5, "8x128": 8.0})  # 11 ms to 9.5
    assert each.speedup.ratio == pytest.approx(11 / 9.5, rel=0.002)
    assert each.is_sparse
    assert not layer(dense, {"1x8": 0.5, "8x128": 10.5}).is_sparse  # 11 to 11


def test_names_and_words() -> None:
    layers = [layer({"1x8": 1.0}, {"1x8": 0.5}), layer({"1x8": 1.0}, {"1x8": 2.0}, outputs=128)]
    why = "its products of 128 x 32 are 0.50× as fast sparse, which is not clearly faster"
    assert dense_weights(layers) == {"128.a": why, "128.b": why}
    assert describe_layers(layers) == "64 x 32 sparse (2.00×), 128 x 32 dense (0.50×)"
    json = layers[0].to_json()
    assert (json["is_sparse"], json["weights"]) == (True, ["64.a", "64.b"])
    assert json["dense_ms"]["1x8"] / json["sparse_ms"]["1x8"] == pytest.approx(2, rel=0.002)
