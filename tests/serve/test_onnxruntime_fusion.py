"""What ONNX Runtime is given for a GPU computes what the artifact computes; here with its kernels for the CPU."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from serve.engines import Array, open_engine
from serve.engines import _onnxruntime_cuda as module
from serve.engines import _onnxruntime_fusion as fusion
from serve.engines._onnxruntime_cuda import FusedSessions, fused
from serve.engines._onnxruntime_elementwise import fuse_elementwise
from serve.engines._onnxruntime_fusion import DOMAIN, fuse_attention

from ..decoders import make_decoder
from ..encoders import make_encoder

Exported = Callable[..., Path]
_BERT = {"Attention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2}
_GPT2 = {"MultiHeadAttention": 2, "SkipLayerNormalization": 4, "FastGelu": 2}
EXPECTED: dict[str, dict[str, int]] = {
    "bert": _BERT, "roberta": _BERT, "distilbert": _BERT, "mpnet": _BERT, "electra": _BERT | {"Gelu": 1},
    "gpt2": _GPT2, "llama": {}, "lm-gpt2": _GPT2,
}  # fmt: skip


def _write(folder: Path, output: Path, *, precision: str = "fp32", form: str = "auto", residual: str = "fp32") -> Path:
    """What export writes of the model in *folder*, without the proofs that take most of its time."""
    from export.cache import PAST, cache_names
    from export.passes import LINEAR_FORMS, run_passes
    from export.pipeline import save_onnx
    from export.precision import to_precision
    from export.source import load_source
    from export.trace import trace
    from pst.sparsify import prunable_weights

    source = load_source(folder)
    weights, model = source.weights(), trace(source, opset=17)
    run_passes(model, weights)
    prunable = {item.name: weights[item.name] for item in prunable_weights(source.model)}
    run_passes(model, prunable, passes=LINEAR_FORMS[form])
    to_precision(
        model, weights, precision=precision, outputs=source.head.outputs, residual=residual,
        halved=cache_names(PAST, len(source.cache)),
    )  # fmt: skip
    output.mkdir()
    save_onnx(model, output / "model.onnx")
    shutil.copy(folder / "config.json", output)
    return output


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """``exported("bert", precision="fp16")``: an artifact of a tiny random model."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, **options: str) -> Path:
        key = (name, *options.values())
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            if name.startswith("lm-"):
                make_decoder(folder / "model", name.removeprefix("lm-"))
            else:
                make_encoder(folder / "model", name, "classification")
            made[key] = _write(folder / "model", folder / "artifact", **options)
        return made[key]

    return make


def _feeds(session: Any, *, mask: Array, past: int = 0) -> dict[str, Array]:
    """Random tokens and cache for what *session* reads; *mask* is of past and new tokens."""
    random = np.random.default_rng(1)
    rows, total = mask.shape
    feeds: dict[str, Array] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = random.standard_normal((rows, value.shape[1], past, value.shape[3])).astype(dtype)
    given = {
        "input_ids": random.integers(4, 35, (rows, total - past)),
        "attention_mask": mask,
        "token_type_ids": random.integers(0, 2, (rows, total - past)),
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)[:, total - mask.shape[1] + past :],
    }
    return feeds | {value.name: given[value.name] for value in session.get_inputs() if value.name in given}


def _session(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _difference(first: Any, second: Any, feeds: dict[str, Array], *, rows: Any = slice(None)) -> float:
    pairs = zip(first.run(None, feeds), second.run(None, feeds), strict=True)
    return max(float(np.abs(one[rows].astype(np.float64) - other[rows]).max()) for one, other in pairs)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_fused_computes_the_same(exported: Exported, name: str) -> None:
    file = exported(name) / "model.onnx"
    plain, cached = _session(str(file)), name.startswith("lm-")
    past = 5 if cached else 0
    whole = np.ones((3, past + 9), dtype=np.int64)
    padded = whole.copy()
    padded[0, slice(0, 4) if cached else slice(-4, None)] = 0
    padded[1, slice(0, 1) if cached else slice(-7, None)] = 0
    for unpadded, mask in ((True, whole), (False, whole), (False, padded)):
        model = onnx.load(file)
        nodes = len(model.graph.node)
        assert fuse_attention(model, unpadded=unpadded) == (0 if name == "llama" else 2)
        if name == "llama":
            assert len(model.graph.node) == nodes
            continue
        fuse_elementwise(model)
        assert Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN) == EXPECTED[name]
        assert not {"Softmax", "Erf"} & {node.op_type for node in model.graph.node}
        quick = _session(model.SerializeToString())
        assert _difference(plain, quick, _feeds(plain, mask=mask, past=past)) < 1e-5
        if cached:  # and a prompt, which has no past
            assert _difference(plain, quick, _feeds(plain, mask=mask[:, :9], past=0)) < 1e-5
        if unpadded:  # the mask is really gone, so that it must never be given a padded batch
            assert {node.op_type for node in model.graph.node if "attention_mask" in node.input} <= {"Shape"}
            assert _difference(plain, quick, _feeds(plain, mask=padded, past=past)) > 1e-3


@pytest.mark.parametrize(
    ("form", "operator", "residual"),
    [("matmul", "Attention", "half"), ("gemm", "MultiHeadAttention", "fp32"), ("conv", "", "fp32")],
)
def test_fp16_and_the_linear_forms(exported: Exported, form: str, operator: str, residual: str) -> None:
    file = exported("bert", precision="fp16", form=form, residual=residual) / "model.onnx"
    model = onnx.load(file)
    assert fuse_attention(model, unpadded=False) == (2 if operator else 0)
    assert {node.op_type for node in model.graph.node if node.domain == DOMAIN} == ({operator} if operator else set())
    assert fuse_elementwise(model) == (6 if operator else 2)
    mask = np.ones((2, 9), dtype=np.int64)
    mask[0, 5:] = 0
    plain = _session(str(file))
    assert _difference(plain, _session(model.SerializeToString()), _feeds(plain, mask=mask)) < 2e-2


class _Sessions:
    """FusedSessions on the CPU, and the engine to compare them with."""

    def __init__(self, folder: Path) -> None:
        self.engine: Any = open_engine(folder, threads=1)
        self.opened: list[Any] = []
        self.sessions = FusedSessions(
            onnxruntime, folder / "model.onnx", self._open, device="cpu", inputs=self.engine.inputs,
            outputs=self.engine.outputs, max_length=self.engine.max_length,
        )  # fmt: skip

    def _open(self, model: Any, graphs: bool) -> Any:
        assert not graphs
        self.opened.append(model)
        return _session(model)


def test_padding_opens_the_session_that_reads_the_mask(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGREED", set())
    tried = _Sessions(exported("bert"))
    random = np.random.default_rng(3)
    assert [type(model) for model in tried.opened] == [str, bytes]  # the file to compare with, and fused
    for rows, tokens in ((1, 5), (2, 7), (1, 5), (3, 5), (2, 7)):
        ids = random.integers(4, 35, (rows, tokens))
        feeds = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": np.ones_like(ids)}
        given = tried.sessions.run(feeds)["logits"]
        np.testing.assert_allclose(given, tried.engine.infer(feeds)["logits"], atol=1e-5)
        before = given.copy()
        tried.sessions.run(feeds | {"input_ids": (ids + 1) % 35})
        np.testing.assert_array_equal(given, before)  # it is the caller's
    assert len(tried.opened) == 2
    feeds["attention_mask"][0, 3:] = 0
    np.testing.assert_allclose(tried.sessions.run(feeds)["logits"], tried.engine.infer(feeds)["logits"], atol=1e-5)
    assert [type(model) for model in tried.opened] == [str, bytes, str, bytes]
    assert [type(model) for model in _Sessions(exported("bert")).opened] == [bytes]  # compared before


@pytest.mark.parametrize(("factor", "words"), [(5.0, "computes something else"), ("no number", "refuses it (")])
def test_a_fused_graph_that_is_wrong_is_not_used(
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float | str,
    words: str,
) -> None:
    """Scores times five, or an attribute of a type that the operator has not."""
    right = fusion._match

    def wrong(graph: Any, softmax: Any) -> tuple[Any, ...]:
        parts = list(right(graph, softmax))
        assert isinstance(parts[3], float)
        parts[3] = factor if isinstance(factor, str) else factor * parts[3]
        return tuple(parts)

    monkeypatch.setattr(fusion, "_match", wrong)
    monkeypatch.setattr(module, "_AGREED", set())
    tried = _Sessions(exported("bert"))
    assert tried.sessions.fused == 0
    assert isinstance(tried.opened[-1], str)
    assert words in capsys.readouterr().err
    ids = np.arange(4, 12)[None]
    feeds = {"input_ids": ids, "token_type_ids": np.zeros_like(ids), "attention_mask": np.ones_like(ids)}
    np.testing.assert_array_equal(tried.sessions.run(feeds)["logits"], tried.engine.infer(feeds)["logits"])


def test_what_cannot_be_fused_says_so(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert fused(exported("llama") / "model.onnx", unpadded=True) is None  # neither attention nor what is around it
    assert "No attention in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_layers_with_different_numbers_of_heads(tmp_path: Path, name: str) -> None:
    from pst.structured.remove import remove_units_
    from pst.structured.units import find_units

    from ..pst.structured.models import make

    folder = make(tmp_path / "model", name)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    units = find_units(model)
    gone = [one.layer + 1 if one.kind == "heads" else 0 for one in units]
    remove_units_(model, [torch.arange(one.count) >= first for one, first in zip(units, gone, strict=True)])
    model.save_pretrained(folder)
    file = _write(folder, tmp_path / "artifact") / "model.onnx"
    plain, graph = _session(str(file)), onnx.load(file)
    assert fuse_attention(graph, unpadded=False) == 2
    attentions = [node for node in graph.graph.node if node.domain == DOMAIN]
    dense = units[0].count
    assert [onnx.helper.get_node_attr_value(node, "num_heads") for node in attentions] == [dense - 1, dense - 2]
    mask = np.ones((3, 9), dtype=np.int64)
    mask[0, 5:] = 0
    assert _difference(plain, _session(graph.SerializeToString()), _feeds(plain, mask=mask)) < 1e-4
