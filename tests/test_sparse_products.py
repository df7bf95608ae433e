"""The benchmark of sparse products: its rows, where they pay, its table, and what it says without a GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sparse_products
from benchmarks.sparse_products import pays, products, render, row_of


def row(tokens: int, ratio: float, *, shape: tuple[int, int] = (3072, 768)) -> dict[str, object]:
    samples = {"dense": [0.01 * tokens * ratio] * 20, "sparse": [0.01 * tokens] * 20}
    return row_of(shape, tokens, "float16", samples, kernel="cuSPARSELt, algorithm 3, split_k 1")


def test_the_three_products_of_a_block_each_once() -> None:
    assert products([768, 3072]) == [
        (768, 768), (3072, 768), (768, 3072), (3072, 3072), (12288, 3072), (3072, 12288),
    ]  # fmt: skip


def test_a_row_tells_ratio_and_operations() -> None:
    found = row(1000, 1.25)
    assert found["dense_ms"] == pytest.approx(12.5)
    assert found["sparse_tflops"] == pytest.approx(2 * 3072 * 768 * 1000 / 10e-3 / 1e12)
    assert found["speedup"]["ratio"] == pytest.approx(1.25)  # type: ignore[index]
    assert found["speedup"]["finding"] == "faster"  # type: ignore[index]


def test_where_it_starts_to_pay() -> None:
    """From there on every larger number of tokens has to be faster; one that is by chance does not count."""
    rows = [row(128, 1.3), row(512, 0.8), row(2048, 1.1), row(16384, 1.4), row(4096, 1.2)]
    rows += [row(tokens, 0.9, shape=(768, 768)) for tokens in (128, 16384)]
    first, second = pays(rows)
    assert (first["from_tokens"], first["best_tokens"]) == (2048, 16384)
    assert first["best_ratio"] == pytest.approx(1.4)
    assert second["from_tokens"] is None
    text = render(
        {"rows": rows, "pays": [first, second], "left_out": ["float16 8 x 8, for want of time"], "method": "By hand."}
    )
    assert "float16 3072 x 768: pays from 2048 tokens on; best 1.40× at 16384." in text
    assert "float16 768 x 768: does not pay at the most tokens" in text
    assert "Left out: float16 8 x 8, for want of time" in text
    assert text.count("slower") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sparse_products.main(["--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "Error: PyTorch sees no NVIDIA GPU on this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with cuSPARSELt")
def test_on_a_gpu(tmp_path: Path) -> None:
    sparse_products.main(["--output", str(tmp_path), "--widths", "256", "--tokens", "128,1024", "--seconds", "20"])
    (file,) = tmp_path.iterdir()
    report = json.loads(file.read_text(encoding="utf-8"))
    assert len(report["rows"]) == 3 * 2 * 2
    assert all(entry["sparse_ms"] > 0 for entry in report["rows"])
