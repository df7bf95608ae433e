"""Batches: the same for the same seed, wherever a run begins; each row once an epoch; padded on the right."""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from pst.batches import CHUNK, Encoded, batch_rows, encode, training_rows
from pst.data import DataSpec, Examples, load_whole
from pst.errors import ModelError


def made_up(rows: int, *, seed: int = 0) -> Encoded:
    """Rows of 1 to 30 tokens whose label is their number and whose tokens say it too."""
    random = np.random.default_rng(seed)
    ids = [[100 + row] * int(random.integers(1, 31)) for row in range(rows)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return Encoded(columns=columns, labels=torch.arange(rows), padding={"input_ids": 7, "attention_mask": 0})


def labels_of(encoded: Encoded, **options: int) -> list[list[int]]:
    return [encoded.batch(rows)["labels"].tolist() for rows in training_rows(encoded.lengths(), **options)]


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 32 * CHUNK + 5])
def test_each_row_comes_once_an_epoch(rows: int) -> None:
    encoded = made_up(rows)
    per_epoch = -(-rows // 32)
    found = labels_of(encoded, batch_size=32, seed=3, first_step=0, steps=3 * per_epoch)
    assert len(found) == 3 * per_epoch
    epochs = [list(chain(*found[start : start + per_epoch])) for start in range(0, len(found), per_epoch)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    if rows > 30:
        assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(0 < len(batch) <= 32 for batch in found)


def test_the_same_seed_gives_the_same_order() -> None:
    options = {"batch_size": 8, "first_step": 0, "steps": 40}
    one, same, other = (labels_of(made_up(100), seed=seed, **options) for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_global_random_states_are_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = labels_of(made_up(100), batch_size=8, seed=5, first_step=0, steps=20)
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(torch.rand(3), drawn[0])
    assert np.array_equal(np.random.rand(3), drawn[1])
    assert labels_of(made_up(100), batch_size=8, seed=5, first_step=0, steps=20) == expected


@pytest.mark.parametrize("first_step", [0, 1, 12, 13, 14, 25, 26, 38, 39])
def test_a_resumed_run_sees_the_rest_of_the_batches(first_step: int) -> None:
    encoded = made_up(100)  # 13 batches of 8 an epoch
    whole = list(training_rows(encoded.lengths(), batch_size=8, seed=2, first_step=0, steps=39))
    rest = list(training_rows(encoded.lengths(), batch_size=8, seed=2, first_step=first_step, steps=39))
    assert len(rest) == 39 - first_step
    assert rest == whole[first_step:]


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 129, size=1600).astype(np.int64)
    sorted_waste = sum(
        int((lengths[rows].max() - lengths[rows]).sum()) for rows in batch_rows(lengths, batch_size=32, seed=0, epoch=0)
    )
    order = np.random.default_rng(1).permutation(1600).reshape(-1, 32)
    random_waste = sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in order)
    assert sorted_waste < random_waste / 10
    longest = [int(lengths[rows].max()) for rows in batch_rows(lengths, batch_size=32, seed=0, epoch=0)]
    assert longest != sorted(longest)  # and yet short ones do not come first


def test_padding_is_on_the_right_and_only_to_the_longest() -> None:
    encoded = Encoded(
        columns={
            "input_ids": [[2, 9, 3], [2, 3], [2, 9, 9, 9, 3]],
            "token_type_ids": [[0, 1, 1], [0, 1], [0, 0, 0, 1, 1]],
            "attention_mask": [[1, 1, 1], [1, 1], [1] * 5],
        },
        labels=torch.tensor([0.5, -1.0, 2.0]),
        padding={"input_ids": 4, "token_type_ids": 0, "attention_mask": 0},
    )
    batch = encoded.batch([1, 0])
    assert batch["input_ids"].tolist() == [[2, 3, 4], [2, 9, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [-1.0, 0.5]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "token_type_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.float32,
    }
    assert len(encoded) == 3
    assert encoded.lengths().tolist() == [3, 2, 5]


@pytest.mark.parametrize("second", [False, True])
def test_encoding_is_the_tokenizers_own_padding_apart(tiny_bert: Path, reviews_file: Path, second: bool) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_bert)
    read = load_whole(DataSpec(data=str(reviews_file)))
    examples = Examples(
        first=read.first, second=list(reversed(read.first)) if second else None, labels=read.labels,
        label_names=None, task="classification", source="made up", fingerprint="",
    )  # fmt: skip
    longest = 18 if second else 12
    encoded = encode(tokenizer, examples, max_length=longest)
    assert encoded.lengths().max() == longest  # cut
    assert encoded.lengths().min() < longest
    rows = [5, 0, 63, 17]
    batch = encoded.batch(rows)
    pairs = [examples.second[row] for row in rows] if examples.second else None
    expected: dict[str, Tensor] = tokenizer(
        [examples.first[row] for row in rows],
        pairs,
        truncation=True,
        max_length=longest,
        padding=True,
        return_tensors="pt",
    )
    assert batch.keys() == {*expected.keys(), "labels"}
    for name in expected:
        assert torch.equal(batch[name], expected[name])
    assert batch["labels"].tolist() == [int(examples.labels[row]) for row in rows]


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    read = Examples(first=["a"], second=None, labels=np.array([0]), label_names=None, task="classification",
                    source="", fingerprint="")  # fmt: skip
    with pytest.raises(ModelError, match=r"no padding token; set pad_token in its tokenizer_config\.json"):
        encode(SimpleNamespace(pad_token_id=None), read, max_length=8)
