"""What takes classifiers alone says so of a language model, whoever made it."""

from pathlib import Path

import pytest

from ..command_line import done
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


def options(command: str, reviews_file: Path) -> tuple[str | Path, ...]:
    return {
        "eval": ("--data", reviews_file),
        "bench": ("--shapes", "1x8", "--output", "report"),
        "serve": ("--port", "0"),
    }[command]


@pytest.mark.parametrize("command", ["eval", "bench", "serve"])
def test_a_language_model(command: str, language_model: Path, reviews_file: Path, refused: Refused) -> None:
    refused(
        command,
        language_model,
        *options(command, reviews_file),
        says=("causal language model (GPT2LMHeadModel)", "AutoModelForCausalLM"),
    )


def test_its_artifact(language_model: Path, reviews_file: Path, tmp_path: Path, refused: Refused) -> None:
    done("export", language_model, "--output", tmp_path / "artifact")
    for command in ("eval", "bench", "serve"):
        more = options(command, reviews_file)
        refused(command, "artifact", *more, says=("exported for text_generation", "sequence classification"))


def test_heads(language_model: Path, refused: Refused) -> None:
    export = ("export", language_model, "--output", "new", "--task")
    refused(*export, "translation", says=("Unknown task 'translation'", "text_generation"))
    refused(*export, "question_answering", says=("no trained head for question_answering", "qa_outputs"))
