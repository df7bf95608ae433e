"""A GPT-2 from nothing: any text survives the tokenizer, sizes are as asked, and the same call gives the same bytes."""

from pathlib import Path

import pytest
import torch

from pst.errors import ConfigError, RunError
from pst.scratch import END_OF_TEXT, make_gpt2

TEXTS = ["The Vaults is a cheap pub near Café Rouge .", "name : The Vaults | price : less than £ 20"] * 3


def test_any_text_can_be_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_gpt2(tmp_path / "gpt2", TEXTS, layers=1, width=8, heads=2, positions=16, vocabulary=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for text in (*TEXTS, "naïve — 漢字 \U0001f600\n\ttabs , and  two spaces", "don 't"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert 0 not in ids
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0].encode()) / 1.5
    assert tokenizer(f"a{END_OF_TEXT}b")["input_ids"].count(tokenizer.eos_token_id) == 1
    assert {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token} == {END_OF_TEXT}
    assert (len(tokenizer), tokenizer.model_max_length) == (300, 16)


def test_sizes_are_as_asked(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    count = make_gpt2(tmp_path / "gpt2", TEXTS, layers=3, width=24, heads=4, positions=20, vocabulary=290, dropout=0.2)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2", output_loading_info=True)
    assert not any(loading.values())
    assert type(model).__name__ == "GPT2LMHeadModel"
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions, config.vocab_size) == (3, 24, 4, 20, 290)
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.2, 0.2, 0.2)
    block = 12 * 24 * 24 + (3 + 1 + 4 + 1) * 24 + 4 * 24  # four matrices, their biases, two LayerNorms
    assert count == (290 + 20) * 24 + 3 * block + 2 * 24
    assert count == sum(parameter.numel() for parameter in model.parameters())


def test_the_seed_decides_and_the_generator_stays(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> list[bytes]:
        make_gpt2(tmp_path / name, TEXTS, layers=1, width=8, heads=2, positions=16, vocabulary=300, seed=seed)
        return [(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "tokenizer.json")]

    state = torch.get_rng_state()
    first = made("a", 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert made("b", 1) == first
    other = made("c", 2)
    assert other[0] != first[0]
    assert other[1] == first[1]


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="width is a multiple of the heads"):
        make_gpt2(tmp_path / "gpt2", TEXTS, width=10, heads=4)
    with pytest.raises(ConfigError, match="vocabulary is 256"):
        make_gpt2(tmp_path / "gpt2", TEXTS, vocabulary=256)
    assert not any(tmp_path.iterdir())
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "mine").touch()
    with pytest.raises(RunError, match="--overwrite"):
        make_gpt2(tmp_path / "gpt2", TEXTS, layers=1, width=8, heads=2, positions=16, vocabulary=260)
