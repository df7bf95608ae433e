"""The quickstart's own model in every kind of pattern: pruned without training, exported, read by three readers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.pipeline import export
from pst import load_structured
from pst.data import DataSpec
from pst.errors import DataError
from pst.prune import prune
from serve.sample import model_folder
from tests.conftest import write_reviews
from tests.export.rtx_parser import outputs_that_tensorrt_rtx_reads

PATTERNS: dict[str, dict[str, Any]] = {"unstructured": {"sparsity": 0.9}, "2:4": {}, "structured": {"sparsity": 0.5}}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 with a random head."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        source = model_folder()
    except DataError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("minilm") / "model"
    AutoModelForSequenceClassification.from_pretrained(source).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_quickstarts_model(pattern: str, classifier: Path, tmp_path: Path) -> None:
    reviews = write_reviews(tmp_path / "reviews.jsonl", rows=32, seed=0)
    prune(
        str(classifier), tmp_path / "pruned", pattern=pattern, adjust=True, data=DataSpec(data=str(reviews)), rows=16,
        **PATTERNS[pattern],
    )  # fmt: skip
    manifest = export(tmp_path / "pruned", tmp_path / "artifact")
    file = tmp_path / "artifact" / "model.onnx"
    assert manifest.pattern == pattern
    wanted = {"unstructured": 0.9, "2:4": 0.5, "structured": 0.5}[pattern]
    assert manifest.sparsity["measured"] == pytest.approx(wanted, abs=0.02)
    assert file.stat().st_size < (75e6 if pattern == "structured" else 95e6)
    onnx.checker.check_model(onnx.load(file), full_check=True)

    ids = np.random.default_rng(0).integers(1000, 30000, (3, 40))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], feeds)
    with torch.inference_mode():
        expected = load_structured(tmp_path / "pruned")(
            **{name: torch.from_numpy(a) for name, a in feeds.items()}
        ).logits
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)

    assert outputs_that_tensorrt_rtx_reads(file) > 0
