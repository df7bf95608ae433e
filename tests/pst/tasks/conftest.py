"""A tiny causal language model, and facts with sentences that state them, in the way of E2E."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pst.config import TrainConfig
from pst.scratch import make_gpt2

NAMES = ("The Vaults", "Blue Spice", "Café Rouge", "The Mill")
FOODS = ("Indian", "French")


def fact_rows() -> list[dict[str, str]]:
    """Eight prompts; the first four have two sentences each, the others one."""
    rows = []
    for number, (food, name) in enumerate(itertools.product(FOODS, NAMES)):
        prompt = f"name : {name} | food : {food}"
        rows.append({"meaning_representation": prompt, "human_reference": f"{name} serves {food} food ."})
        if number < 4:
            rows.append({"meaning_representation": prompt, "human_reference": f"{name} is a place with {food} food ."})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose training and validation rows are the same twelve."""
    folder = tmp_path_factory.mktemp("facts")
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", fact_rows())
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT2LMHeadModel without dropout: 2 layers, width 32, 64 positions, byte-level tokens."""
    folder = tmp_path_factory.mktemp("tiny_lm") / "model"
    texts = [text for row in fact_rows() for text in row.values()]
    make_gpt2(folder, texts, layers=2, width=32, heads=2, positions=64, vocabulary=330, dropout=0.0)
    return folder


def told(model: Path, data: Path, **changes: Any) -> TrainConfig:
    """Options of a short dense run on facts; *changes* override any of it."""
    defaults: dict[str, Any] = {"task": "data_to_text", "method": "dense", "steps": 6, "batch_size": 6}
    defaults |= {"device": "cpu", "num_beams": 3, "max_new_tokens": 24}
    return TrainConfig(model=str(model), data=str(data), **(defaults | changes))
