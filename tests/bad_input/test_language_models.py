"""What takes classifiers alone says so of a language model, whoever made it."""

from pathlib import Path

import pytest

from ..conftest import save_tokenizer
from .conftest import Refused


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A random GPT2LMHeadModel: 1 layer, width 16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    size = save_tokenizer(folder, model_max_length=32)
    GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=1, n_positions=32)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["export", "eval", "bench", "serve"])
def test_a_language_model(command: str, language_model: Path, reviews_file: Path, refused: Refused) -> None:
    options = {
        "export": ("--output", "artifact"),
        "eval": ("--data", reviews_file),
        "bench": ("--shapes", "1x8", "--output", "report"),
        "serve": ("--port", "0"),
    }[command]
    refused(command, language_model, *options, says=("causal language model (GPT2LMHeadModel)", "AutoModelForCausalLM"))
