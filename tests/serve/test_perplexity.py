"""Perplexity in ONNX Runtime against pst train's own, which is PyTorch's cross entropy."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst.data import DataSpec
from pst.distributed import Processes
from pst.documents import load_whole
from pst.errors import ConfigError, DataError, ModelError
from pst.sequences import token_loss
from pst.tasks.language_modeling import encode
from serve import perplexity
from serve.bench.runner import bench
from serve.evaluate import evaluate
from serve.generate import Generator

from ..conftest import BAD, FILLER, GOOD
from ..decoders import KINDS

Exported = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 documents of 1 to 59 words."""
    random, file = np.random.default_rng(2), tmp_path_factory.mktemp("corpus") / "corpus.txt"
    texts = [" ".join(random.choice([*GOOD, *BAD, *FILLER], int(random.integers(1, 60)))) for _ in range(30)]
    file.write_text("\n\n".join(texts), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("longest", [1024, 50, 7])
def test_the_number_is_pytorchs(
    exported: Exported, corpus: Path, kind: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, artifact = exported(kind)
    monkeypatch.setattr(perplexity, "LONGEST", longest)
    tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="[SEP]")
    blocks = encode(tokenizer, load_whole(DataSpec(data=str(corpus))), max_length=min(64, longest))
    expected = token_loss(
        AutoModelForCausalLM.from_pretrained(folder), blocks, batch_size=8, device=torch.device("cpu"),
        processes=Processes(),
    )  # fmt: skip
    result = evaluate(artifact, DataSpec(data=str(corpus)), batch_size=5, threads=1)
    assert result.metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert result.value == pytest.approx(expected["perplexity"], rel=1e-5)
    assert result.metric == "perplexity"
    assert (result.rows, result.targets) == (30, blocks.weight(range(len(blocks))))
    assert f"{result.targets} tokens of 30 documents" in result.render()
    assert json.loads(json.dumps(result.to_json()))["max_length"] == min(64, longest)


def test_several_blocks_in_an_inference_change_nothing(exported: Exported) -> None:
    blocks = np.random.default_rng(0).integers(4, 35, (9, 20)).tolist()
    blocks[-1] = blocks[-1][:3]
    with Generator(exported("gpt2")[1], threads=1) as model:
        alone = [perplexity.token_loss(model, [block], batch_size=1) for block in blocks]
        loss, targets = perplexity.token_loss(model, blocks, batch_size=4)
    assert targets == sum(count for _, count in alone) == 8 * 19 + 2
    assert loss * targets == pytest.approx(sum(each * count for each, count in alone), rel=1e-6)


def test_a_loss_beyond_floats() -> None:
    assert perplexity.perplexity(2.0) == math.exp(2)
    assert math.isfinite(perplexity.perplexity(10_000.0))


def test_bench_puts_it_beside_the_speed(exported: Exported, corpus: Path, tmp_path: Path) -> None:
    paths, data = [exported(kind)[1] for kind in KINDS], DataSpec(data=str(corpus))
    report = bench(
        paths, shapes=[(1, 8)], output=tmp_path / "r", threads=1, warmup=1, runs=2, precision=0, new_tokens=2, data=data
    )
    assert [entry.workload for entry in report.of(report.subjects[0].name)] == ["1x8 prompt", "1x8 +2 tokens"]
    for subject, path in zip(report.subjects, paths, strict=True):
        assert subject.accuracy is not None
        assert (subject.accuracy.metric, subject.accuracy.rows) == ("perplexity", 30)
        assert subject.accuracy.value == pytest.approx(evaluate(path, data, threads=1).value)
    assert "Down and to the left is better." in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_measured(
    exported: Exported, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = exported("gpt2")[1]
    with pytest.raises(ConfigError, match="--predictions"):
        evaluate(artifact, DataSpec(data=str(corpus)), predictions=tmp_path / "rows.jsonl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"words": "a film"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column with a usual name for text"):
        evaluate(artifact, DataSpec(data=str(rows)))
    with Generator(artifact, threads=1) as model:
        model.eos_ids = []
        with pytest.raises(ModelError, match="no end-of-text token"):
            perplexity.blocks_of(model, load_whole(DataSpec(data=str(corpus))))
        model.eos_ids = [50256]  # GPT-2's own, which a configuration of another vocabulary gets by default
        with pytest.raises(ModelError, match="token 50256 as the end of a text, but has 35 tokens"):
            perplexity.blocks_of(model, load_whole(DataSpec(data=str(corpus))))
