"""The pattern check on hand-made graphs, where each way to be wrong can be set up alone."""

from typing import Any

import numpy as np
import pytest
from onnx import helper

from export.passes.name_weights import same_bits
from export.verify import measured_sparsity, verify_claims, verify_graph, weights_as_found
from pst.errors import ArtifactError, PatternError

from .conftest import graph, matmul_model, two_four

W = two_four(16, 8)  # PyTorch's layout: outputs x inputs


def claim(weight: "np.ndarray[Any, Any]" = W, axis: int = 1, name: str = "W") -> list[dict[str, Any]]:
    density = np.count_nonzero(weight) / weight.size
    return [{"name": name, "shape": list(weight.shape), "axis": axis, "density": density}]


def test_transposed_and_plain_storage() -> None:
    (info,) = verify_graph(matmul_model(W.T.copy()), {"W": W}, claim(), pattern="2:4")
    assert (info.initializer, info.shape, info.axis, info.density) == ("W", (8, 16), 0, 0.5)
    gemm = graph([helper.make_node("Gemm", ["x", "W"], ["y"], transB=1)], {"W": W})
    (info,) = verify_graph(gemm, {"W": W}, claim(), pattern="2:4")
    assert (info.shape, info.axis) == ((16, 8), 1)
    assert measured_sparsity([info]) == 0.5
    assert measured_sparsity([]) == 0.0


def test_conv1d_storage() -> None:
    weight = W.T.copy()
    (info,) = verify_graph(matmul_model(weight), {"W": weight}, claim(weight, 0), pattern="2:4")
    assert (info.shape, info.axis) == ((8, 16), 0)


def test_square_weight_multiplied_the_wrong_way_round() -> None:
    """2:4 holds in the file's rows, as trained; the graph sums over its columns."""
    square = two_four(8, 8)
    verify_claims({"W": square}, claim(square), pattern="2:4")
    with pytest.raises(ArtifactError, match="W in the ONNX graph is not the trained weight"):
        verify_graph(matmul_model(square), {"W": square}, claim(square), pattern="2:4")


def test_pattern_is_checked_along_the_axis_of_the_graph() -> None:
    dense = np.ones((8, 8), np.float32)  # symmetric: equal bits either way
    with pytest.raises(ArtifactError, match=r"Pattern 2:4 does not hold in W .*\(axis 0 of \[8, 8\]\)"):
        verify_graph(matmul_model(dense), {"W": dense}, claim(dense), pattern="2:4")
    verify_graph(matmul_model(dense), {"W": dense}, claim(dense), pattern="dense")


def test_changed_zero_sign_or_value() -> None:
    for change in (0.5, -0.0):
        changed = W.copy()
        changed[tuple(np.argwhere(W == 0)[0])] = change
        with pytest.raises(ArtifactError, match="is not the trained weight"):
            verify_graph(matmul_model(changed.T.copy()), {"W": W}, claim(), pattern="2:4")


def test_weight_that_the_graph_does_not_use() -> None:
    with pytest.raises(ArtifactError, match="No matrix product of the ONNX graph multiplies with V"):
        verify_graph(matmul_model(W.T.copy()), {"V": W + 1}, claim(W + 1, name="V"), pattern="dense")


def test_equal_weights_may_share_an_initializer() -> None:
    (first, second) = verify_graph(
        matmul_model(W.T.copy()), {"W": W, "V": W}, [*claim(), *claim(name="V")], pattern="2:4"
    )
    assert (first.initializer, second.initializer, second.name) == ("W", "W", "V")


def test_claims_against_the_weights() -> None:
    verify_claims({"W": W}, claim(), pattern="2:4")
    with pytest.raises(ArtifactError, match="does not hold"):
        verify_claims({"W": W}, claim(), pattern="1:4")
    with pytest.raises(ArtifactError, match=r"has density 0\.5000; it is 1\.0000"):
        verify_claims({"W": W + 9}, claim(), pattern="2:4")
    with pytest.raises(PatternError):
        verify_claims({"W": W}, claim(), pattern="two of four")


def test_weights_as_found() -> None:
    (info,) = weights_as_found(matmul_model(W.T.copy()), {"W": W, "bias": W[0]})
    assert (info.name, info.density) == ("W", 0.5)
    assert weights_as_found(matmul_model(W.T.copy()), {"other": W}) == ()


def test_same_bits() -> None:
    zero = np.zeros((2, 2), np.float32)
    nan = zero + np.float32("nan")
    assert same_bits(nan, nan.copy())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.astype(np.float64))
    assert not same_bits(zero, zero.reshape(4))
