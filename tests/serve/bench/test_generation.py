"""Language models: what is timed, and how the report shows it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.errors import ConfigError
from serve.bench import openings
from serve.bench.report import Report
from serve.bench.runner import bench
from serve.bench.workload import check_shapes, generation_workloads
from serve.decoding import Decoding
from serve.engines import Array, open_engine
from serve.generate import Generator

Exported = Callable[[str], tuple[Path, Path]]
NEW = 5


@pytest.fixture(scope="module")
def measurement(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """Two models with one vocabulary, as if they were a dense and a sparse one."""
    output = tmp_path_factory.mktemp("bench") / "report"
    paths = [exported(kind)[1] for kind in ("llama", "gpt2")]
    return bench(
        paths, shapes=[(1, 8), (3, 16)], output=output, threads=1, warmup=1, runs=12, precision=0, new_tokens=NEW
    ), output


def test_a_prompt_and_the_tokens_after_it_are_two_workloads(measurement: tuple[Report, Path]) -> None:
    report, output = measurement
    content = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(report.to_json()))
    assert content["schema_version"] == 2
    names = [f"{shape}{part}" for shape in ("1x8", "3x16") for part in (" prompt", f" +{NEW} tokens")]
    assert list(dict.fromkeys(entry["workload"] for entry in content["measurements"])) == names
    for entry in content["measurements"]:
        assert entry["latency"]["runs"] == 12
        assert (entry["speedup"] is None) == (entry["artifact"] == content["baseline"])
        if entry["workload"].endswith("prompt"):
            assert (entry["new_tokens"], entry["per_token_ms"], entry["tokens_per_s"]) == (0, None, None)
        else:
            assert entry["new_tokens"] == NEW
            assert entry["per_token_ms"] == pytest.approx(entry["latency"]["p50"] / NEW)
            assert entry["tokens_per_s"] == pytest.approx(entry["batch"] * NEW * 1000 / entry["latency"]["mean"])
    assert "empty key/value cache" in content["method"]
    assert {receipt["workload"] for receipt in content["receipts"]} == {"1x8 prompt", "3x16 prompt"}
    for receipt in content["receipts"]:
        assert all(layer["time_ms"] > 0 for layer in receipt["layers"])


def test_people_see_time_and_tokens(measurement: tuple[Report, Path]) -> None:
    report, output = measurement
    entry = next(entry for entry in report.measurements if entry.new_tokens)
    markdown = (output / "report.md").read_text(encoding="utf-8")
    for text in (markdown, report.render()):
        assert "ms/token" in text
        assert f"{entry.per_token_ms:.3f}" in text
        assert f"{entry.tokens_per_s:.1f}" in text
    assert f"1x8 +{NEW} tokens (" in report.verdicts()[0]
    page = (output / "report.html").read_text(encoding="utf-8")
    labels = re.findall(r'<text x="(\d+)" y="[\d.]+" text-anchor="end">([^<]+)</text>', page)
    assert {f"3x16 +{NEW} tokens", "1x8 prompt"} <= {label for _, label in labels}
    assert all(int(end) >= 6 * len(label) for end, label in labels), "a label is cut off at the left"


@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_that_are_timed_are_the_generators(
    exported: Exported, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    class Recorded(Decoding):
        def step(self, tokens: Array) -> Array:
            read.append(tokens.tolist())
            return super().step(tokens)

    monkeypatch.setattr(openings, "Decoding", Recorded)
    artifact = exported("gpt2")[1]
    bench([artifact], shapes=[(batch, 8)], output=tmp_path / "r", threads=1, warmup=1, runs=2, new_tokens=NEW)
    prompt, _ = generation_workloads((batch, 8), vocab_size=35, new_tokens=NEW)
    with Generator(artifact, threads=1) as model:
        model.eos_ids = []
        expected = model.generate(prompt.feeds[0]["input_ids"].tolist(), max_new_tokens=NEW)
    assert read == 3 * np.array(expected).T.tolist()  # the warm-up and both runs, from the same prompt


def test_a_prompt_starts_with_an_empty_cache(exported: Exported) -> None:
    prompt, _ = generation_workloads((2, 8), vocab_size=35, new_tokens=1)
    with open_engine(exported("llama")[1], threads=1) as engine:
        feeds = prompt.feeds_of(0, engine.inputs)
        assert set(feeds) == set(engine.inputs)
        assert {value.shape[:1] + value.shape[2:3] for name, value in feeds.items() if "past" in name} == {(2, 0)}
        assert engine.infer(feeds)["logits"].shape == (2, 8, 35)


def test_user_errors(exported: Exported, bert_artifact: Path, tmp_path: Path) -> None:
    artifact, options = exported("gpt2")[1], {"output": tmp_path / "report", "threads": 1}
    refused: list[tuple[list[Path], dict[str, Any], str]] = [
        ([artifact, bert_artifact], {"shapes": [(1, 4)]}, "artifact is a language model, and bert is not"),
        ([artifact], {"shapes": [(1, 33)]}, r"with 32 new tokens is longer than .*\(64 tokens\).* of 32 or less"),
        ([artifact], {"shapes": [(1, 4)], "new_tokens": 0}, "--new-tokens"),
    ]
    for paths, more, message in refused:
        with pytest.raises(ConfigError, match=message):
            bench(paths, **options, **more)  # type: ignore[arg-type]
    assert not (tmp_path / "report").exists()
    check_shapes([(1, 32)], {"a": 64}, new_tokens=32)
