"""Causal language models with their key/value cache, run by plain ONNX Runtime against PyTorch without a cache."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from export import parity, pipeline
from export.graph import find_weights, load_onnx
from export.manifest import Manifest
from export.pipeline import export
from export.source import load_source
from pst.errors import ArtifactError, ModelError
from pst.patterns import parse_pattern
from tests.export.rtx_parser import outputs_that_tensorrt_rtx_reads

from ..decoders import KINDS, make_decoder, prune

Array = np.ndarray[Any, Any]
FORMS = {("gpt2", "2:4"): "conv", ("llama", "2:4"): "gemm", ("gpt2", "dense"): "gemm", ("llama", "dense"): "conv"}
"""Linear forms of some; the others are as torch.onnx writes them."""
Exported = Callable[[str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """``exported("gpt2", "2:4")``: a tiny sparse decoder's folder, and its artifact. Read only."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(kind: str, pattern: str) -> tuple[Path, Path]:
        if (kind, pattern) not in made:
            folder = make_decoder(tmp_path_factory.mktemp("decoder") / "model", kind)
            if pattern != "dense":
                prune(folder, pattern)
            export(folder, folder.parent / "artifact", linear_form=FORMS.get((kind, pattern), "auto"))
            made[kind, pattern] = folder, folder.parent / "artifact"
        return made[kind, pattern]

    return make


def in_steps(artifact: Path, ids: Array, mask: Array, ends: list[int]) -> tuple[Array, list[Array]]:
    """Logits of all positions and the last presents, the graph reading tokens up to each of *ends* in turn."""
    session = onnxruntime.InferenceSession(str(artifact / "model.onnx"), providers=["CPUExecutionProvider"])
    specs = {value.name: value.shape for value in session.get_inputs()}
    past = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        for name, shape in specs.items()
        if name.startswith("past_key_values.")
    }
    positions, parts, start = np.maximum(mask.cumsum(1) - 1, 0), [], 0
    for end in ends:
        feeds = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": positions[:, start:end],
        }
        logits, *presents = session.run(None, feeds | past)
        parts.append(logits)
        past, start = dict(zip(past, presents, strict=True)), end
    return np.concatenate(parts, axis=1), list(past.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [[12], [1, 2, 12], [5, 6, 7, 8, 9, 10, 11, 12], [4, 12]])
def test_steps_with_a_past_equal_the_whole_without_one(exported: Exported, kind: str, ends: list[int]) -> None:
    folder, artifact = exported(kind, "dense")
    random = np.random.default_rng(len(ends))
    mask = (np.arange(12) >= np.array([[0], [3], [0], [7]])).astype(np.int64)
    ids = random.integers(0, 35, mask.shape)
    logits, presents = in_steps(artifact, ids, mask, ends)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row in range(4):  # each alone, so that padding cannot hide anything
        real = torch.from_numpy(ids[row, mask[row] == 1][None])
        with torch.inference_mode():
            whole = model(real, use_cache=True)
        start = 12 - real.shape[1]
        np.testing.assert_allclose(logits[row, start:], whole.logits[0].numpy(), atol=2e-5)
        cache = [tensor for layer in whole.past_key_values.layers for tensor in (layer.keys, layer.values)]
        for present, expected in zip(presents, cache, strict=True):
            np.testing.assert_allclose(present[row, :, start:], expected[0].numpy(), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_optimums(exported: Exported, kind: str) -> None:
    folder, artifact = exported(kind, "dense")
    manifest, heads, width = Manifest.load(artifact), 2, {"gpt2": 16, "llama": 8}[kind]
    past = ("batch_size", heads, "past_sequence_length", width)
    both = "past_sequence_length + sequence_length"
    parts = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert {value.name: value.shape for value in manifest.inputs} == {
        "input_ids": ("batch_size", "sequence_length"),
        "attention_mask": ("batch_size", both),
        "position_ids": ("batch_size", "sequence_length"),
        **{f"past_key_values.{part}": past for part in parts},
    }
    assert {value.name: value.shape for value in manifest.outputs} == {
        "logits": ("batch_size", "sequence_length", 35),
        **{f"present.{part}": ("batch_size", heads, both, width) for part in parts},
    }
    assert (manifest.task, manifest.opset, manifest.labels, manifest.max_length) == ("text_generation", 17, (), 64)
    assert manifest.parity.label_agreement == 1.0
    assert {case["name"] for case in manifest.parity.cases} >= {"random 1x1", "random 5x64", "built-in text"}
    assert "generation_config.json" in manifest.files
    assert AutoTokenizer.from_pretrained(artifact).padding_side == "left"
    onnx.checker.check_model(onnx.load(artifact / "model.onnx"), full_check=True)
    assert load_source(folder).model.config.use_cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "4:8", "block:4x4"])
def test_patterns_lie_along_the_axis_that_is_summed_over(exported: Exported, kind: str, pattern: str) -> None:
    folder, artifact = exported(kind, pattern)
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    listed = {weight.name: weight for weight in Manifest.load(artifact).weights}
    assert len(listed) == {"gpt2": 8, "llama": 14}[kind]
    found = {weight.name: weight for weight in find_weights(load_onnx(artifact / "model.onnx"))}
    for name, weight in listed.items():
        matrix, axis = found[weight.initializer].matrix()
        original = trained[name].numpy()
        np.testing.assert_array_equal(np.moveaxis(matrix, axis, 0), original if kind == "gpt2" else original.T)
        assert parse_pattern(pattern).holds(matrix, axis=axis)
        assert 0 < weight.density < 1


@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_rtx_reads_it(exported: Exported, kind: str) -> None:
    _, artifact = exported(kind, "2:4")
    assert outputs_that_tensorrt_rtx_reads(artifact / "model.onnx") > 0


def test_other_opsets(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "model", "llama")
    assert export(folder, tmp_path / "18", opset=18).opset == 18
    assert export(folder, tmp_path / "external", external_data=True).parity.max_abs_error < 1e-4


def test_a_fault_with_a_past_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is right for prompts, but forgets the first token of the past."""

    class Forgets:
        def __init__(self, session: Any) -> None:
            self.get_inputs, self.get_outputs, self._run = session.get_inputs, session.get_outputs, session.run

        def run(self, names: Any, feeds: dict[str, Array]) -> Any:
            mask = feeds["attention_mask"].copy()
            if feeds["past_key_values.0.key"].shape[2]:
                mask[:, 0] = 0
            return self._run(names, feeds | {"attention_mask": mask})

    monkeypatch.setattr(pipeline, "open_session", lambda path: Forgets(parity.open_session(path)))
    with pytest.raises(ArtifactError, match=r"differs from PyTorch by .* in logits on random 1x7 inputs"):
        export(make_decoder(tmp_path / "model", "gpt2"), tmp_path / "out")


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        load_source(folder, **options)


def test_models_that_keep_no_plain_cache(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel, MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64}  # fmt: skip
    for name, model, words in (
        ("window", MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, sliding_window=8)), "another form"),
        ("encoder", BertLMHeadModel(BertConfig(**sizes)), "depends on the tokens that follow"),
    ):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / name)
        refused(tmp_path / name, words)
    refused(tiny_bert, "cannot be opened|depends on|lack", task="text_generation")


def test_a_decoder_pads_with_its_end_of_text(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "model", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    source = load_source(folder)
    assert (source.pad_token_id, source.tokenizer.padding_side) == (tokenizer.eos_token_id, "left")


def test_damaged_decoder(tmp_path: Path) -> None:
    folder = make_decoder(tmp_path / "model", "llama")
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(broken, r"has no weights \(its weights lack model\.layers\.2")
