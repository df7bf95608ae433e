"""Text to blocks: every token in its place, documents that are read, whole runs, and data that is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pst.data import in_validation
from pst.documents import Documents, load, load_whole
from pst.errors import DataError, ModelError
from pst.sequences import load_causal
from pst.tasks.language_modeling import encode
from pst.train import train
from tests.pst.tasks.conftest import fact_rows, told, write_rows
from tests.pst.training import report, tensors

TEXTS = [" . ".join(row.values()) for row in fact_rows()]


def options(model: Path, data: Path, **changes: Any) -> Any:
    return told(model, data, **({"task": "language_modeling", "max_length": 32} | changes))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files: twelve documents to train on, four of them to measure on."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    (folder / "valid.txt").write_text("\n \n\n".join(TEXTS[:4]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("max_length", [3, 7, 32, 64, 1000])
def test_blocks_are_the_stream_cut_up(max_length: int, tiny_lm: Path) -> None:
    tokenizer = load_causal(str(tiny_lm))[1]
    stream = []
    for text in TEXTS:
        stream += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    blocks = encode(tokenizer, Documents(texts=TEXTS, source="texts"), max_length=max_length)
    joined = [token for block in blocks.ids for token in block]
    assert joined == stream[: len(joined)]
    assert len(stream) - len(joined) == (len(stream) % max_length == 1)
    assert {len(block) for block in blocks.ids[:-1]} <= {max_length}
    assert blocks.weight(range(len(blocks))) == len(joined) - len(blocks)


def test_a_last_token_alone_goes(tiny_lm: Path) -> None:
    tokenizer = load_causal(str(tiny_lm))[1]
    length = len(tokenizer("The Mill")["input_ids"])
    documents = Documents(texts=["The Mill"], source="texts")
    assert [len(block) for block in encode(tokenizer, documents, max_length=length).ids] == [length]
    with pytest.raises(DataError, match="no two tokens in a row"):
        encode(tokenizer, Documents(texts=[""], source="texts"), max_length=8)


def test_text_files(corpus: Path) -> None:
    config = options(corpus, corpus)
    assert load(config, split="train").texts == TEXTS
    assert load(config, split="validation").texts == TEXTS[:4]
    alone = options(corpus, corpus / "train.txt", validation=str(corpus / "valid.txt"))
    assert load(alone, split="validation").fingerprint == load(config, split="validation").fingerprint
    assert load(options(corpus, corpus, limit=3), split="train").texts == [TEXTS[i] for i in (0, 4, 8)]


def test_whole(corpus: Path) -> None:
    assert load_whole(options(corpus, corpus / "train.txt")).texts == TEXTS
    (corpus / "windows.txt").write_text("\n\n".join(TEXTS), encoding="utf-8-sig", newline="\r\n")
    assert load_whole(options(corpus, corpus / "windows.txt")).texts == TEXTS
    assert load_whole(options(corpus, corpus / "train.txt", limit=3)).texts == [TEXTS[i] for i in (0, 4, 8)]
    assert load_whole(options(corpus, corpus)).texts == TEXTS[:4]


def test_a_file_is_split_by_document(corpus: Path) -> None:
    config = options(corpus, corpus / "train.txt", validation_fraction=0.4)
    held_out = [text for text in TEXTS if in_validation(text, 0.4)]
    assert 0 < len(held_out) < 12
    assert load(config, split="validation").texts == held_out
    assert load(config, split="train").texts == [text for text in TEXTS if text not in held_out]


def test_a_table_with_a_text_column(tmp_path: Path) -> None:
    rows = [{"text": text, "other": f"o {text}"} for text in TEXTS] + [{"text": " ", "other": "x"}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert load(options(data, data, validation=str(data)), split="train").texts == TEXTS  # an empty text says nothing
    other = options(data, data, validation=str(data), text_columns=("other",))
    assert load(other, split="validation").texts[0] == f"o {TEXTS[0]}"


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ([{"words": "a"}], (), r"no column with a usual name for text .*has words\).*text_columns"),
        ([{"text": "a"}], ("words",), r"'words' is not in .* text_columns"),
        ([{"text": "a"}], ("text", "words"), r"names 2 columns; .*task=data_to_text"),
        ([{"text": "a"}, {"text": " "}, {"text": None}], ("text",), r"too few documents \(1\) .* validation=FILE"),
        ([{"text": ""}, {"text": None}], (), r"holds no text"),
        ([{"text": 1}], (), r"'text' .* int values \(row 1\), not text"),
    ],
)
def test_tables_that_are_refused(
    rows: list[dict[str, Any]], columns: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    config = options(data, data, text_columns=columns, validation_fraction=1e-9)
    with pytest.raises(DataError, match=says):
        load(config, split="validation")


def test_text_files_that_are_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    train_file = corpus / "train.txt"
    for data, validation, says in (
        (tmp_path / "empty.txt", "", "holds no text"),
        (tmp_path / "latin.txt", "", r"not UTF-8 text \(byte 3\)"),
        (train_file, str(tmp_path / "none.txt"), "is not a text file"),
        (train_file, str(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])), "is not a text file"),
        (tmp_path / "none.txt", "", "does not exist"),
    ):
        with pytest.raises(DataError, match=says):
            load(options(data, data, validation=validation), split="train")


def test_a_run_learns_and_leaves_a_language_model(tiny_lm: Path, corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = options(tiny_lm, corpus, steps=50, lr=1e-2, eval_every=1)
    metrics = train(config, tmp_path / "run").metrics
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first = next(value for line in lines if "eval" in (value := json.loads(line)))["eval"]
    assert list(metrics) == ["loss", "perplexity"]
    assert metrics["loss"] < first["loss"] / 2
    assert report(tmp_path / "run")["task"] == "language_modeling"
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    blocks = encode(tokenizer, Documents(texts=TEXTS[:4], source="texts"), max_length=32)
    assert report(tmp_path / "run")["data"]["validation"]["tokens"] == sum(map(len, blocks.ids))
    losses = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in blocks.ids]
    total = sum(loss * (len(ids) - 1) for loss, ids in zip(losses, blocks.ids, strict=True))
    assert metrics["loss"] == pytest.approx(total / blocks.weight(range(len(blocks))), rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))


def test_a_sparse_language_model(tiny_lm: Path, corpus: Path, tmp_path: Path) -> None:
    result = train(options(tiny_lm, corpus, method="pst", pattern="2:4", r2=4), tmp_path / "run")
    weight = tensors(result.model)["transformer.h.0.mlp.c_fc.weight"]  # inputs x outputs
    assert (weight.T.reshape(-1, 4) != 0).sum(-1).eq(2).all()


def test_an_encoder_is_refused(tiny_bert: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no causal language model"):
        train(options(tiny_bert, corpus), tmp_path / "out")
