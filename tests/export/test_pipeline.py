"""The whole export on tiny models, checked with plain ONNX Runtime and none of this package's code."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from export import parity, passes, pipeline
from export.cases import Case, all_cases
from export.manifest import Manifest, Parity
from export.pipeline import export
from export.source import load_source
from pst.errors import ArtifactError, ConfigError, ModelError, PSTError, RunError, StorageError
from pst.files import sha256

from .conftest import Artifact, matmul_model

SENTENCES = ["the film is lovely .", "a dull , tedious plot !", "superb"]


def run_plainly(folder: Path, sentences: list[str], second: list[str] | None = None) -> "np.ndarray[Any, Any]":
    """What a stranger does: the artifact's tokenizer, and an InferenceSession."""
    encoded = AutoTokenizer.from_pretrained(folder)(
        sentences, second, truncation=True, padding=True, return_tensors="np"
    )
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {value.name: encoded[value.name].astype(np.int64) for value in session.get_inputs()}
    logits: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0]
    return logits


def run_torch(folder: Path, sentences: list[str], second: list[str] | None = None) -> "np.ndarray[Any, Any]":
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(sentences, second, truncation=True, max_length=64, padding=True, return_tensors="pt")
    keys = {"input_ids", "attention_mask"} | ({"token_type_ids"} if model.config.model_type == "bert" else set())
    accepted = {name: value for name, value in encoded.items() if name in keys}
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(**accepted).logits.numpy()
    return logits


@pytest.mark.parametrize(("pattern", "sparsity"), [("dense", 0.0), ("unstructured", 0.7), ("2:4", 0.5)])
def test_artifact_in_plain_onnx_runtime(
    artifact: Artifact, tiny_bert: Path, sparse_model: Callable[..., Path], pattern: str, sparsity: float
) -> None:
    folder = artifact(pattern, sparsity)
    source = tiny_bert if pattern == "dense" else sparse_model(pattern, sparsity)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "export.json", "model.onnx", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    np.testing.assert_allclose(run_plainly(folder, SENTENCES), run_torch(source, SENTENCES), atol=1e-5)
    pair = run_plainly(folder, SENTENCES, SENTENCES[::-1])  # segment ids matter
    np.testing.assert_allclose(pair, run_torch(source, SENTENCES, SENTENCES[::-1]), atol=1e-5)
    long = ["the film is a story " * 40]
    assert AutoTokenizer.from_pretrained(folder)(long, truncation=True)["input_ids"][0].__len__() == 64
    np.testing.assert_allclose(run_plainly(folder, long), run_torch(source, long), atol=1e-5)

    manifest = Manifest.load(folder)
    assert [value.name for value in manifest.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {value.shape for value in manifest.inputs} == {("batch_size", "sequence_length")}
    assert (manifest.outputs[0].name, manifest.outputs[0].shape) == ("logits", ("batch_size", 2))
    assert (manifest.opset, manifest.precision, manifest.task) == (17, "fp32", "classification")
    assert manifest.labels == ("NEGATIVE", "POSITIVE")
    assert (manifest.max_length, manifest.pad_token_id, manifest.pattern) == (64, 0, pattern)
    assert manifest.parity.label_agreement == 1.0
    assert manifest.parity.max_abs_error < 1e-5
    assert {case["name"] for case in manifest.parity.cases} >= {"random 1x1", "random 5x64", "built-in text"}
    assert manifest.source["sha256"]["model.safetensors"] == sha256(source / "model.safetensors")
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"export.json"}
    assert abs(manifest.sparsity["measured"] - sparsity) < 1e-3
    assert len(manifest.weights) == (14 if pattern == "dense" else 12)


def test_zeros_are_where_they_were(artifact: Artifact, sparse_model: Callable[..., Path]) -> None:
    """Oracle: the state dict against the initializers that the manifest names, with plain onnx."""
    state = AutoModelForSequenceClassification.from_pretrained(sparse_model("2:4", 0.5)).state_dict()
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(artifact("2:4", 0.5) / "model.onnx").graph.initializer
    }
    for weight in Manifest.load(artifact("2:4", 0.5)).weights:
        trained, exported = state[weight.name].numpy(), stored[weight.initializer]
        assert weight.name == weight.initializer
        assert exported.tobytes() == (trained if weight.axis == 1 else trained.T.copy()).tobytes()
        groups = np.moveaxis(exported, weight.axis, -1).reshape(-1, 4)
        assert np.count_nonzero(groups, axis=1).max() == 2
        assert weight.density == 0.5


def test_gpt2_keeps_its_axis(tiny_gpt2: Path, tmp_path: Path) -> None:
    manifest = export(tiny_gpt2, tmp_path / "out")
    assert [value.name for value in manifest.inputs] == ["input_ids", "attention_mask"]
    axes = {weight.name: weight.axis for weight in manifest.weights}
    assert axes["transformer.h.0.attn.c_attn.weight"] == 0
    np.testing.assert_allclose(run_plainly(tmp_path / "out", SENTENCES), run_torch(tiny_gpt2, SENTENCES), atol=1e-5)


def test_same_input_gives_same_bytes(artifact: Artifact, sparse_model: Callable[..., Path], tmp_path: Path) -> None:
    moved = shutil.copytree(sparse_model("2:4", 0.5), tmp_path / "elsewhere")
    again = export(moved, tmp_path / "out")
    first = Manifest.load(artifact("2:4", 0.5))
    assert again.files == first.files
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    for trace in (b".py", str(tmp_path).encode(), b"site-packages", b"pkg.torch"):
        assert trace not in content


def test_run_folder_examples_and_opset_18(
    sparse_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(sparse_model("2:4", 0.5), run / "model")
    examples = _Examples(first=[f"the film is lovely {'very ' * (row % 9)}" for row in range(40)])
    level = logging.getLogger("torch.onnx").level
    manifest = export(run, tmp_path / "out", opset=18, examples=examples)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "torch" not in captured.err.lower().replace("pytorch", "")
    assert logging.getLogger("torch.onnx").level == level
    assert manifest.opset == 18
    assert manifest.parity.cases[-1]["name"] == "real"
    assert manifest.parity.cases[-1]["rows"] == 40


class _Examples:
    """The part of pst.data.Examples that an export reads."""

    def __init__(self, first: list[str], second: list[str] | None = None) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)


def test_regression(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1, ignore_mismatched_sizes=True)
    model.config.problem_type = "regression"
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    manifest = export(folder, tmp_path / "out", examples=_Examples(["lovely"], ["dull"]))
    assert (manifest.task, manifest.labels, manifest.parity.label_agreement) == ("regression", (), None)
    assert manifest.outputs[0].shape == ("batch_size", 1)


def test_external_data(tiny_bert: Path, artifact: Artifact, tmp_path: Path) -> None:
    manifest = export(tiny_bert, tmp_path / "out", external_data=True)
    assert {"model.onnx", "model.onnx.data"} < set(manifest.files)
    np.testing.assert_array_equal(
        run_plainly(tmp_path / "out", SENTENCES), run_plainly(artifact("dense", 0.0), SENTENCES)
    )
    (tmp_path / "out" / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"lacks model\.onnx\.data"):
        Manifest.load(tmp_path / "out")


def test_large_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_PROTOBUF_LIMIT", 4096)
    pipeline.save_onnx(matmul_model(np.zeros((32, 32), np.float32)), tmp_path / "at.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["at.onnx"]
    pipeline.save_onnx(matmul_model(np.ones((32, 33), np.float32)), tmp_path / "over.onnx")
    assert (tmp_path / "over.onnx.data").stat().st_size >= 32 * 33 * 4
    assert (tmp_path / "over.onnx.data").stat().st_mode == (tmp_path / "over.onnx").stat().st_mode
    assert onnx.numpy_helper.to_array(onnx.load(tmp_path / "over.onnx").graph.initializer[0]).all()


# Refusals -------------------------------------------------------------------------------------------------------------


def refused(source: Path, output: Path, error: type[PSTError], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match):
        export(source, output, **options)
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if "partial" in path.name]


def tampered(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    report = json.loads((target / "sparsity.json").read_text())
    (target / "sparsity.json").write_text(json.dumps(report | changes))
    return target


def test_claimed_pattern_that_does_not_hold(sparse_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tampered(sparse_model("unstructured", 0.7), tmp_path / "model", pattern="2:4")
    refused(model, tmp_path / "out", ArtifactError, r"Pattern 2:4 does not hold in bert\.encoder")


def test_claims_that_differ_from_the_weights(sparse_model: Callable[..., Path], tmp_path: Path) -> None:
    source = sparse_model("2:4", 0.5)
    row = json.loads((source / "sparsity.json").read_text())["weights"][0]
    for number, (key, (value, match)) in enumerate(
        {
            "density": (0.4, "has density 0.4000; it is 0.5000"),
            "axis": (0, "Pattern 2:4 does not hold in .* along its reduction axis .axis 0 of"),
            "shape": ([1, 2], r"is \[1, 2\] with reduction axis 1"),
            "name": ("bert.missing.weight", "lists bert.missing.weight, which the model does not have"),
        }.items()
    ):
        model = tampered(source, tmp_path / str(number), weights=[row | {key: value}])
        refused(model, tmp_path / "out", ArtifactError, match)
    refused(tampered(source, tmp_path / "a", pattern=None), tmp_path / "out", PSTError, "Unknown pattern 'None'")
    refused(tampered(source, tmp_path / "b", weights=[{}]), tmp_path / "out", ModelError, "not a whole sparsity report")
    refused(tampered(source, tmp_path / "c", schema_version=2), tmp_path / "out", ModelError, "schema version 2")
    refused(tampered(source, tmp_path / "d", max_length=65), tmp_path / "out", ModelError, "the model has 1 to 64")


def test_weight_changed_by_a_broken_pass(
    sparse_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, weights: Any) -> list[str]:
        names = passes.run_passes(model, weights)
        tensor = next(entry for entry in model.graph.initializer if entry.name.endswith("layer.1.output.dense.weight"))
        array = onnx.numpy_helper.to_array(tensor).copy()
        array[tuple(index[0] for index in np.nonzero(array == 0))] = 1e-7  # too little for the outputs to show it
        tensor.raw_data = array.tobytes()
        return names

    monkeypatch.setattr(pipeline, "run_passes", broken)
    message = r"layer\.1\.output\.dense\.weight in the ONNX graph is not the trained weight"
    refused(sparse_model("2:4", 0.5), tmp_path / "out", ArtifactError, message)


class _FaultySession:
    def __init__(
        self, session: Any, change: Callable[["np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"], *, rows: int = 0
    ) -> None:
        """*change* the answers, or with *rows* those to a batch of so many alone."""
        self._session, self._change, self._rows = session, change, rows

    def run(self, names: Any, feeds: Any) -> list["np.ndarray[Any, Any]"]:
        outputs: list[np.ndarray[Any, Any]] = self._session.run(names, feeds)
        return [self._change(outputs[0])] if self._rows in (0, len(feeds["input_ids"])) else outputs


def test_outputs_beyond_the_tolerance(
    tiny_bert: Path, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = artifact("dense", 0.0)  # made before the fault is injected

    def off(logits: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return logits + np.float32(0.01)

    monkeypatch.setattr(pipeline, "open_session", lambda path: _FaultySession(parity.open_session(path), off))
    refused(tiny_bert, tmp_path / "out", ArtifactError, r"differs from PyTorch by 0\.01")

    source, session = load_source(tiny_bert), parity.open_session(dense / "model.onnx")
    with pytest.raises(ArtifactError, match="differs from PyTorch by nan"):
        parity.check_parity(source, _FaultySession(session, lambda logits: logits * np.float32("nan")))
    with pytest.raises(ArtifactError, match="gives shape"):
        parity.check_parity(source, _FaultySession(session, lambda logits: logits[:, :1]))
    parity.check_parity(source, _FaultySession(session, off), atol=0.02)


def test_the_mean_of_differences_counts_on_random_inputs_only_where_asked(artifact: Artifact, tiny_bert: Path) -> None:
    source, session = load_source(tiny_bert), parity.open_session(artifact("dense", 0.0) / "model.onnx")
    cases = all_cases(source, None)
    texts = {case.shape[0] for case in cases if not case.random}
    random = max({case.shape[0] for case in cases if case.random} - texts)

    def check(rows: int, *, random_too: bool) -> None:
        off = _FaultySession(session, lambda logits: logits + np.float32(0.01), rows=rows)
        parity.check_parity(source, off, atol=1.0, rms=0.005, rms_of_random=random_too)

    with pytest.raises(ArtifactError, match="root mean square in logits on random"):
        check(random, random_too=True)
    check(random, random_too=False)
    with pytest.raises(ArtifactError, match="root mean square in logits on built-in text"):
        check(max(texts), random_too=False)


def test_labels_may_differ_only_in_ties(tiny_bert: Path) -> None:
    source = load_source(tiny_bert)
    case = Case(name="text", feeds={"input_ids": np.ones((2, 3), np.int64)})
    expected = np.array([[1.0, 1.00001], [0.0, 1.0]], np.float32)
    actual = np.array([[1.00001, 1.0], [0.0, 1.0]], np.float32)
    output = parity.Output(name="logits", expected=expected, actual=actual)
    assert parity._compare(source, case, output, atol=1e-4, rtol=1e-3).tolist() == [False, True]
    with pytest.raises(ArtifactError, match="differs from PyTorch by 1 in logits on text inputs"):
        parity._compare(source, case, replace(output, actual=expected[:, ::-1].copy()), atol=0.1, rtol=0.0)
    regression = replace(source, task="regression")
    assert parity._compare(regression, case, output, atol=1e-4, rtol=0).size == 0  # no answer to agree on
    with pytest.raises(ArtifactError, match="not finite"):
        parity._compare(source, case, replace(output, expected=np.full_like(expected, np.inf)), atol=1e-4, rtol=1e-3)


def test_the_tolerance_grows_with_the_outputs(tiny_bert: Path) -> None:
    source, case = load_source(tiny_bert), Case(name="text", feeds={"input_ids": np.ones((1, 4), np.int64)})
    expected = np.array([[30.0, -30.0, 30.0, 0.0]], np.float32)
    for scale, off, fits in ((1.0, 0.002, True), (1.0, 0.003, False), (0.01, 0.002, False)):
        output = parity.Output(name="logits", expected=expected * scale, actual=expected * scale)
        output.actual[0, 3] += off
        if fits:
            parity._compare(source, case, output, atol=1e-4, rtol=0)
        else:
            with pytest.raises(ArtifactError, match="differs"):
                parity._compare(source, case, output, atol=1e-4, rtol=0)


def test_the_mean_difference_counts_where_asked(tiny_bert: Path) -> None:
    source, case = load_source(tiny_bert), Case(name="text", feeds={"input_ids": np.ones((1, 100), np.int64)})
    expected = np.zeros((1, 100), np.float32)
    single, everywhere = expected.copy(), expected + np.float32(0.05)
    single[0, 3] = 0.09
    for actual, fits in ((single, True), (everywhere, False)):
        output = parity.Output(name="logits", expected=expected, actual=actual)
        parity._compare(source, case, output, atol=0.1, rtol=0)
        if fits:
            parity._compare(source, case, output, atol=0.1, rtol=0, rms=0.01)
        else:
            with pytest.raises(ArtifactError, match=r"by 0\.05 in the root mean square .* tolerance of 0\.01"):
                parity._compare(source, case, output, atol=0.1, rtol=0, rms=0.01)


def test_what_lies_at_padding_does_not_count(tiny_bert: Path) -> None:
    source, case = load_source(tiny_bert), Case(name="text", feeds={"input_ids": np.ones((1, 2), np.int64)})
    expected = np.array([[[1.0, 2.0], [9.0, 1.0]]], np.float32)
    actual = np.array([[[1.0, 2.0], [1.0, 9.0]]], np.float32)
    real = np.array([[[True], [False]]])
    output = parity.Output(name="logits", expected=expected, actual=actual, counts=real)
    assert parity._compare(source, case, output, atol=0, rtol=0).tolist() == [True]
    with pytest.raises(ArtifactError, match="differs from PyTorch by 8"):
        parity._compare(source, case, replace(output, counts=~real), atol=0, rtol=0)
    actual[0, 1, 0] = np.nan  # not even there, since 0 times NaN is NaN
    with pytest.raises(ArtifactError, match="differs"):
        parity._compare(source, case, output, atol=0, rtol=0)


def test_full_disk(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = onnx.load_from_string(matmul_model(np.eye(4, dtype=np.float32)).SerializeToString())
    monkeypatch.setattr(pipeline, "trace", lambda source, opset: traced)
    monkeypatch.setattr(pipeline, "open_session", lambda path: None)
    parity_of = Parity(max_abs_error=0, max_rel_error=0, label_agreement=1, tolerance={}, cases=())
    monkeypatch.setattr(pipeline, "check_parity", lambda *args, **options: parity_of)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(*args: Any, **options: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        refused(tiny_bert, tmp_path / "out", StorageError, "No space is left")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full_in_rust)
        refused(tiny_bert, tmp_path / "out", StorageError, "No space is left")


def test_existing_output_is_kept(tiny_bert: Path, artifact: Artifact) -> None:
    folder = artifact("dense", 0.0)
    before = sha256(folder / "export.json")
    with pytest.raises(RunError, match="--overwrite"):
        export(tiny_bert, folder)
    assert sha256(folder / "export.json") == before
    export(tiny_bert, folder, overwrite=True)
    assert sha256(folder / "export.json") == before


@pytest.mark.parametrize("opset", [16, 99])
def test_opset_that_cannot_be_written(tiny_bert: Path, tmp_path: Path, opset: int) -> None:
    refused(tiny_bert, tmp_path / "out", ConfigError, f"Opset {opset} cannot be written", opset=opset)


def test_negative_tolerance(tiny_bert: Path, tmp_path: Path) -> None:
    refused(
        tiny_bert,
        tmp_path / "out",
        ConfigError,
        "--atol is nan; it must be a finite number of at least 0",
        atol=float("nan"),
    )
