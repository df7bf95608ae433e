"""The kernels that skip zeros, by themselves: their product against numpy's, compiled with several options."""

import ctypes
import functools
import itertools
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.bench.environment import cpu_flags
from serve.engines import _sparse_library
from serve.engines._sparse_layout import as_two_of_four, in_blocks
from serve.engines._sparse_library import COMPILERS, OPTIONS, SOURCE, sparse_library

from .sparse_weights import two_of_four

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS), reason="needs a C compiler: apt-get install gcc libc6-dev"
)


def _pointer(array: "np.ndarray[Any, Any]") -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


FLAGS = {"as it is compiled here": "", "AVX2": "-mavx2 -mfma -mno-avx512f", "no AVX": "-mno-avx"}
"""What compilers for x86 are told, after what they are told of this processor."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``compiled("-mno-avx")``: the kernels, compiled with these flags, and with *words* of the source replaced."""
    folder = tmp_path_factory.mktemp("compiled")

    @functools.cache
    def library(flags: str = "", words: tuple[str, str] = ("", "")) -> Path:
        if not (flags or words[0]):
            return sparse_library()
        if flags and platform.machine() != "x86_64":
            pytest.skip(f"{flags} is for x86")
        if "avx2" in flags and "avx2" not in cpu_flags():
            pytest.skip("this processor has no AVX2")
        number = len(list(folder.iterdir()))
        source, target = folder / str(number) / SOURCE.name, folder / f"{number}.so"
        shutil.copytree(SOURCE.parent, source.parent)
        text = source.read_text(encoding="utf-8")
        assert words[0] in text
        source.write_text(text.replace(*words), encoding="utf-8")
        native = ["-march=native"] if platform.machine() == "x86_64" else []
        command = [*_sparse_library._compiler(), *OPTIONS, *native, *flags.split(), str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    return library


def _multiply(
    x: "np.ndarray[Any, Any]",
    weight: "np.ndarray[Any, Any]",
    bias: "np.ndarray[Any, Any]",
    *,
    library: Path,
    block: int = 64,
) -> "np.ndarray[Any, Any]":
    """By the kernel for zeros anywhere; *block* 0: by the one for 2:4."""
    y = np.full((len(x), len(weight)), np.nan, np.float32)
    sizes = [ctypes.c_int64(size) for size in (len(x), x.shape[1], len(weight))]
    parts = in_blocks(weight, block) if block else as_two_of_four(weight)
    arrays = [np.ascontiguousarray(array) for array in (x, *parts.values(), bias)]
    functions = ctypes.CDLL(str(library))
    function = functions.pst_sparse_linear if block else functions.pst_two_of_four_linear
    function(*map(_pointer, [*arrays, y]), *sizes, *([ctypes.c_int64(block)] if block else []))
    return y


TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 20, 25, 33, 36, 48, 50, 63, 64, 65, 68, 72, 100, 130, 200]


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 5), (16, 16), (17, 63), (64, 48), (100, 129), (270, 300)])
def test_the_product_is_that_of_numpy(
    compiled: Callable[..., Path], outputs: int, inputs: int, tokens: int, kind: str
) -> None:
    random = np.random.default_rng(tokens * outputs + inputs)
    library = compiled(FLAGS[kind])
    x, bias = random.standard_normal((tokens, inputs), np.float32), random.standard_normal(outputs, np.float32)
    for density, block in itertools.product((0.0, 0.1, 0.5, 1.0), (8, 64, 128, 256)):
        weight = random.standard_normal((outputs, inputs), np.float32) * (random.random((outputs, inputs)) < density)
        expected = x.astype(np.float64) @ weight.T + bias
        found = _multiply(x, weight, bias, library=library, block=block)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_product_in_2of4_is_that_of_numpy(compiled: Callable[..., Path], tokens: int, kind: str) -> None:
    random = np.random.default_rng(tokens)
    library = compiled(FLAGS[kind])
    for outputs, inputs in ((1, 4), (15, 8), (16, 28), (17, 32), (48, 64), (100, 100), (33, 132), (270, 300)):
        weight = two_of_four(outputs, inputs, seed=tokens)
        x, bias = random.standard_normal((tokens, inputs), np.float32), random.standard_normal(outputs, np.float32)
        expected = x.astype(np.float64) @ weight.T + bias
        found = _multiply(x, weight, bias, library=library, block=0)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("block", [64, 0])
@pytest.mark.parametrize("tokens", [1, 4, 9, 70])
def test_a_sum_that_is_infinite_stays_so(compiled: Callable[..., Path], tokens: int, block: int) -> None:
    """Of 300 inputs the first makes it infinite, in the first block of several."""
    weight, x = np.zeros((20, 300), np.float32), np.ones((tokens, 300), np.float32)
    weight[:, 0], weight[:, 299], x[:, 0] = 1e30, 1, 1e30
    found = _multiply(x, weight, np.zeros(20, np.float32), library=compiled(), block=block)
    assert np.isposinf(found).all()


@pytest.mark.parametrize("block", [64, 0])
@pytest.mark.parametrize("tokens", [1, 3, 7, 70])
def test_more_outputs_than_fit_beside_one_tile(compiled: Callable[..., Path], tokens: int, block: int) -> None:
    random = np.random.default_rng(0)
    weight, bias = two_of_four(17000, 20), random.standard_normal(17000, np.float32)
    x = random.standard_normal((tokens, 20), np.float32)
    found = _multiply(x, weight, bias, library=compiled(), block=block)
    np.testing.assert_allclose(found, x @ weight.T + bias, atol=1e-4)


@pytest.mark.parametrize("block", [64, 0])
@pytest.mark.parametrize("tokens", [2, 70])
def test_without_memory_it_still_multiplies(compiled: Callable[..., Path], tokens: int, block: int) -> None:
    random = np.random.default_rng(0)
    weight, bias = two_of_four(5, 8), random.standard_normal(5, np.float32)
    x = random.standard_normal((tokens, 8), np.float32)
    library = compiled(words=("malloc(wanted * sizeof(float) + 64)", "NULL"))
    found = _multiply(x, weight, bias, library=library, block=block)
    np.testing.assert_allclose(found, x @ weight.T + bias, atol=1e-5)
