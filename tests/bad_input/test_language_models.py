"""What takes language models as artifacts alone says so of others, whoever made them."""

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
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=1, n_positions=32, eos_token_id=3)
    GPT2LMHeadModel(config).save_pretrained(folder)
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
        says=("causal language model (GPT2LMHeadModel)", "take its artifact, which pst export makes"),
    )


def test_its_artifact(language_model: Path, reviews_file: Path, tmp_path: Path, refused: Refused) -> None:
    done("export", language_model, "--output", tmp_path / "artifact")
    refused(
        "eval", "artifact", "--data", reviews_file, "--predictions", "rows.jsonl", says=("--predictions", "classifiers")
    )
    refused(
        "bench", "artifact", *options("bench", reviews_file), says=("1x8 with 32 new tokens", "artifact can read (32")
    )
    assert "perplexity" in done("eval", "artifact", "--data", reviews_file)
    assert "1x8 +4 tokens" in done("bench", "artifact", *options("bench", reviews_file), "--new-tokens", "4")


def test_other_artifacts(language_model: Path, reviews_file: Path, tmp_path: Path, refused: Refused) -> None:
    done("export", language_model, "--task", "feature_extraction", "--output", tmp_path / "artifact")
    for command in ("eval", "bench", "serve"):
        refused(command, "artifact", *options(command, reviews_file), says=("exported for feature_extraction",))


def test_heads(language_model: Path, refused: Refused) -> None:
    export = ("export", language_model, "--output", "new", "--task")
    refused(*export, "translation", says=("Unknown task 'translation'", "text_generation"))
    refused(*export, "question_answering", says=("no trained head for question_answering", "qa_outputs"))
