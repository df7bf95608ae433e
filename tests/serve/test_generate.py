"""Greedy decoding in ONNX Runtime against model.generate in torch, on random decoders and prompts of all lengths."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst.errors import ArtifactError, ConfigError, DataError, EngineError, ModelError
from serve.engines import open_engine
from serve.generate import Generator

from ..conftest import BAD, FILLER, GOOD
from ..decoders import KINDS

Pair = tuple[Path, Path]
END = 3


def reference(folder: Path, prompts: list[list[int]], *, new: int, **options: Any) -> list[list[int]]:
    """Each prompt alone through transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **options
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def random_prompts(count: int, *, most: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(4, 35, int(random.integers(1, most + 1))).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_transformers(exported: Callable[[str], Pair], kind: str) -> None:
    folder, artifact = exported(kind)
    prompts = random_prompts(60, most=40)
    expected = reference(folder, prompts, new=20)
    ended = [answer[-1] == END for answer in expected]
    assert any(ended)  # so that what follows is seen to stop where it should
    assert not all(ended)
    with Generator(artifact, threads=1) as model:
        assert model.eos_ids == [END]
        assert model.generate(prompts, max_new_tokens=20) == expected  # together, padded on the left
        assert [model.generate([prompt], max_new_tokens=20)[0] for prompt in prompts[:5]] == expected[:5]
        assert model.generate([], max_new_tokens=20) == []
        assert model.generate(prompts[:3], max_new_tokens=1) == [answer[:1] for answer in expected[:3]]


@pytest.mark.parametrize("kind", KINDS)
def test_texts(exported: Callable[[str], Pair], kind: str) -> None:
    folder, artifact = exported(kind)
    tokenizer, random = AutoTokenizer.from_pretrained(folder), np.random.default_rng(1)
    texts = [" ".join(random.choice([*GOOD, *BAD, *FILLER], 4 + row % 7)) for row in range(12)]
    expected = tokenizer.batch_decode(
        reference(folder, [tokenizer(text)["input_ids"] for text in texts], new=8), skip_special_tokens=True
    )
    with Generator(artifact, threads=1, verify=True) as model:
        assert model.complete(texts, max_new_tokens=8) == expected
        assert model.complete([], max_new_tokens=8) == []


def test_up_to_the_last_position(exported: Callable[[str], Pair]) -> None:
    folder, artifact = exported("gpt2")
    prompts = random_prompts(4, most=1, seed=3)
    with Generator(artifact, threads=1) as model:
        model.eos_ids = []
        answers = model.generate(prompts, max_new_tokens=63)
        assert answers == reference(folder, prompts, new=63, eos_token_id=-1)
        with pytest.raises(DataError, match="Prompt 1 has 2 tokens; with 63 new ones it must have 1 to 1"):
            model.generate([[5], [5, 6]], max_new_tokens=63)


def test_several_ends_of_text(exported: Callable[[str], Pair], tmp_path: Path) -> None:
    folder, artifact = exported("llama")
    changed = shutil.copytree(artifact, tmp_path / "artifact")
    settings = json.loads((changed / "generation_config.json").read_text())
    (changed / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [3, 7, 9, 11]}))
    prompts = random_prompts(20, most=9, seed=2)
    with Generator(changed, threads=1) as model:
        answers = model.generate(prompts, max_new_tokens=12)
    assert answers == reference(folder, prompts, new=12, eos_token_id=[3, 7, 9, 11])
    assert any(answer[-1] in (7, 9, 11) for answer in answers)
    (changed / "generation_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"lacks generation_config\.json"):
        Generator(changed)


def test_what_cannot_be_asked(exported: Callable[[str], Pair]) -> None:
    _, artifact = exported("gpt2")
    with Generator(artifact, threads=1) as model:
        with pytest.raises(ConfigError, match="max_new_tokens is 0"):
            model.generate([[5]], max_new_tokens=0)
        with pytest.raises(DataError, match="Prompt 0 has 0 tokens"):
            model.generate([[]], max_new_tokens=4)
    with pytest.raises(EngineError, match="closed"):
        model.generate([[5]], max_new_tokens=1)


def test_other_artifacts(exported: Callable[[str], Pair], tiny_bert: Path, tmp_path: Path) -> None:
    from export.pipeline import export

    export(tiny_bert, tmp_path / "artifact")
    with pytest.raises(ModelError, match="exported for classification; give the artifact of a causal"):
        Generator(tmp_path / "artifact")
    _, artifact = exported("gpt2")
    shutil.copyfile(artifact / "export.json", tmp_path / "artifact" / "export.json")
    with pytest.raises(ArtifactError, match=r"lacks generation_config\.json"):
        Generator(tmp_path / "artifact")
    shutil.copyfile(artifact / "generation_config.json", tmp_path / "artifact" / "generation_config.json")
    with pytest.raises(ArtifactError, match="without a key/value cache"):
        Generator(tmp_path / "artifact")


def test_an_empty_past_is_no_empty_input(exported: Callable[[str], Pair]) -> None:
    _, artifact = exported("gpt2")
    with open_engine(artifact, threads=1) as engine:
        past = {
            name: np.zeros((1, 2, 0, 16), np.float32) for name in engine.inputs if name.startswith("past_key_values.")
        }
        tokens = dict.fromkeys(("input_ids", "attention_mask", "position_ids"), np.ones((1, 1), np.int64))
        assert engine.infer(tokens | past)["logits"].shape == (1, 1, 35)
        with pytest.raises(EngineError, match="is empty"):
            engine.infer(tokens | past | {"input_ids": np.ones((1, 0), np.int64)})
        with pytest.raises(EngineError, match="is empty"):
            engine.infer(tokens | past | {"past_key_values.0.key": np.zeros((0, 2, 0, 16), np.float32)})
