"""Every architecture x head x pattern x linear form through the whole export, checked with onnx and ONNX Runtime.

Each pair of the four meets in a cell (35 of them); PST_FULL_MATRIX=1 runs all 700. Causal language models with their
cache are in test_decoders.py.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from export.graph import find_weights, load_onnx
from export.manifest import Manifest
from export.pipeline import export
from pst.patterns import parse_pattern
from tests.export.rtx_parser import outputs_that_tensorrt_rtx_reads

from ..decoders import prune
from ..encoders import ARCHITECTURES, HEADS, LABELS, make_encoder

PATTERNS = ("unstructured", "2:4", "1:4", "4:8", "block:4x4")
FORMS = ("auto", "gemm", "conv", "matmul")
FULL = os.environ.get("PST_FULL_MATRIX") == "1"
CELLS = [
    (kind, head, pattern, form)
    for row, kind in enumerate(ARCHITECTURES)
    for column, head in enumerate(HEADS)
    for place, pattern in enumerate(PATTERNS)
    for step, form in enumerate(FORMS)
    if FULL or (place == (row + column) % len(PATTERNS) and step == (row + 3 * column) % len(FORMS))
]
SENTENCES = ["the film is lovely .", "a dull , tedious plot and a story of war !", "superb"]
PRUNED = {"gpt2": 8, "llama": 14}  # of two layers; 12 of others
OUTPUTS: dict[str, dict[str, tuple[str | int, ...]]] = {
    "classification": {"logits": ("batch_size", 3)},
    "regression": {"logits": ("batch_size", 1)},
    "token_classification": {"logits": ("batch_size", "sequence_length", 3)},
    "question_answering": dict.fromkeys(("start_logits", "end_logits"), ("batch_size", "sequence_length")),
    "feature_extraction": {"last_hidden_state": ("batch_size", "sequence_length", 32)},
}
STORED = {"matmul": ("MatMul", 0, 2), "gemm": ("Gemm", 1, 2), "conv": ("Conv", 1, 4)}
"""Operator, reduction axis and rank of a weight in each form."""
Cell = tuple[str, str, str, str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Cell], tuple[Path, Path]]:
    """``exported(cell)``: the tiny sparse model's folder, and its artifact. Read only."""
    made: dict[Cell, tuple[Path, Path]] = {}

    def make(cell: Cell) -> tuple[Path, Path]:
        if cell not in made:
            kind, head, pattern, form = cell
            folder = prune(make_encoder(tmp_path_factory.mktemp("cell") / "model", kind, head), pattern)
            export(folder, folder.parent / "artifact", linear_form=form)
            made[cell] = folder, folder.parent / "artifact"
        return made[cell]

    return make


def test_every_pair_meets() -> None:
    kinds = (ARCHITECTURES, tuple(HEADS), PATTERNS, FORMS)
    for first, second in itertools.combinations(range(4), 2):
        assert {(cell[first], cell[second]) for cell in CELLS} == {(a, b) for a in kinds[first] for b in kinds[second]}


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_cell(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    kind, head, pattern, form = cell
    folder, artifact = exported(cell)
    manifest, path = Manifest.load(artifact), artifact / "model.onnx"
    assert (manifest.task, manifest.pattern, manifest.opset, manifest.max_length) == (head, pattern, 17, 64)
    assert manifest.labels == (LABELS if head in ("classification", "token_classification") else ())
    assert {value.name: value.shape for value in manifest.outputs} == OUTPUTS[head]

    model = onnx.load(path)
    assert "IsNaN" not in {node.op_type for node in model.graph.node}  # see export/passes/drop_nan_guard.py
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)

    state = _model(folder, head).state_dict()
    weights = {weight.name: weight for weight in find_weights(load_onnx(path))}
    assert len(manifest.weights) == PRUNED.get(kind, 12)
    for row in manifest.weights:
        stored = weights[row.initializer]
        trained = state[row.name].numpy() if kind == "gpt2" else state[row.name].numpy().T  # inputs x outputs
        matrix, axis = stored.matrix()
        np.testing.assert_array_equal(np.moveaxis(matrix, axis, 0), trained)
        assert parse_pattern(pattern).holds(matrix, axis=axis)
        assert (row.form, row.axis, len(row.shape)) == STORED.get(form, ("Gemm" if kind == "gpt2" else "MatMul", 0, 2))
        assert row.density == np.count_nonzero(trained) / trained.size < 0.6

    _same_answers(folder, artifact, head)


def _model(folder: Path, head: str) -> Any:
    return getattr(transformers, HEADS[head]).from_pretrained(folder).eval()


def _same_answers(folder: Path, artifact: Path, head: str) -> None:
    """What a stranger does with the artifact, against what one does with the model, on text of several lengths."""
    encoded = transformers.AutoTokenizer.from_pretrained(artifact)(SENTENCES, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {value.name: encoded[value.name].astype(np.int64) for value in session.get_inputs()}
    found = dict(zip(OUTPUTS[head], session.run(list(OUTPUTS[head]), feeds), strict=True))
    with torch.inference_mode():
        expected = _model(folder, head)(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    for name, array in found.items():
        assert np.ptp(array) > 1e-3  # the answer depends on something
        np.testing.assert_allclose(array, expected[name].numpy(), atol=2e-5)


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_tensorrt_rtx_reads_it(cell: Cell, exported: Callable[[Cell], tuple[Path, Path]]) -> None:
    _, artifact = exported(cell)
    assert outputs_that_tensorrt_rtx_reads(artifact / "model.onnx") == len(OUTPUTS[cell[1]])


UNKNOWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "xlm-roberta": {"max_position_embeddings": 65},
    "deberta-v2": {},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_type_without_a_file_follows_the_generic_rule(kind: str, tmp_path: Path) -> None:
    folder = prune(make_encoder(tmp_path / "model", kind, "classification", **UNKNOWN[kind]), "2:4")
    manifest = export(folder, tmp_path / "artifact")
    assert len(manifest.weights) == {"albert": 6, "xlm-roberta": 12, "deberta-v2": 12, "modernbert": 8}[kind]
    assert manifest.sparsity["measured"] == 0.5
    onnx.checker.check_model(onnx.load(tmp_path / "artifact" / "model.onnx"), full_check=True)
    _same_answers(folder, tmp_path / "artifact", "classification")
