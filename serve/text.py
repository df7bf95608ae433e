"""Text to a model's inputs, with the tokenizers library alone: no transformers, no torch.

``TextEncoder`` gives exactly what ``AutoTokenizer.from_pretrained(folder)(texts, truncation=True, padding=True,
max_length=...)`` gives: whatever truncation and padding tokenizer.json carries from its own training is overridden.
"""

import importlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst.errors import DataError, EngineError, ModelError
from pst.files import read_json

Array = np.ndarray
REMEDY = "copy the whole folder, or make it again with a tokenizer that saves tokenizer.json."
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One encoded text or pair, cut to the encoder's max_length and not padded; both arrays are (length,) int64."""

    ids: Array
    type_ids: Array

    def __len__(self) -> int:
        return len(self.ids)


class TextEncoder:
    """The tokenizer of a model or artifact folder. Safe to share between threads once made.

    Texts are cut to *max_length* tokens; None leaves them whole.

    Raises ModelError where *folder* holds no usable tokenizer.json, EngineError where tokenizers is not installed.
    """

    def __init__(self, folder: Path, *, max_length: int | None) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder} holds no tokenizer.json; {REMEDY}")
        try:
            tokenizers: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise EngineError(
                'The tokenizers package is not installed; install it with: pip install "sparse-pst[cpu]".'
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file} is damaged ({error}); {REMEDY}") from error
        settings = _settings(folder)
        truncation, padding = self._tokenizer.truncation or {}, self._tokenizer.padding or {}
        self.max_length = max_length
        self.padding_side = settings.get("padding_side") or padding.get("direction") or "right"
        self.pad_id = self._pad_id(folder, settings, padding)
        self.eos_id = self._id_of(settings.get("eos_token"))
        """Of the end-of-text token, None where the tokenizer names none."""
        self._tokenizer.no_padding()
        if max_length is None:
            self._tokenizer.no_truncation()
            return
        try:
            self._tokenizer.enable_truncation(
                max_length=max_length,
                strategy="longest_first",
                direction=settings.get("truncation_side") or truncation.get("direction") or "right",
            )
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{file} cannot cut texts to {max_length} tokens: {error}") from error

    def _pad_id(self, folder: Path, settings: dict[str, Any], padding: dict[str, Any]) -> int | None:
        known = self._id_of(settings.get("pad_token") or padding.get("pad_token"))
        if known is None and (folder / "config.json").is_file():
            known = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("pad_token_id")
        return known

    def _id_of(self, token: Any) -> int | None:
        """The number of a special token, which older files hold in an object."""
        content = token.get("content") if isinstance(token, dict) else token
        known: int | None = self._tokenizer.token_to_id(content) if content else None
        return known

    def tokenize(
        self, first: Sequence[str], second: Sequence[str] | None = None, *, special: bool = True
    ) -> list[Tokens]:
        """One Tokens per text, or per pair of *first* and *second*, cut to max_length from the longer one.

        *special*: with the special tokens that the tokenizer puts around a text.
        Raises DataError for a text that is not valid Unicode, or that leaves no token at all.
        """
        rows = [(text,) for text in first] if second is None else list(zip(first, second, strict=True))
        for index, row in enumerate(rows):
            for text in row:
                if not _is_unicode(text):
                    raise DataError(f"Text {index} holds half of a surrogate pair, which is not valid Unicode; fix it.")
        encodings = self._tokenizer.encode_batch(list(first) if second is None else rows, add_special_tokens=special)
        result = []
        for index, encoding in enumerate(encodings):
            if not encoding.ids:
                raise DataError(f"Text {index} holds nothing that the model's tokenizer knows; give one with words.")
            result.append(
                Tokens(ids=np.array(encoding.ids, dtype=np.int64), type_ids=np.array(encoding.type_ids, dtype=np.int64))
            )
        return result

    def collate(
        self, rows: Sequence[Tokens], *, names: Iterable[str], shape: tuple[int, int] | None = None
    ) -> dict[str, Array]:
        """Pad *rows* to the longest; the inputs called *names*, each (rows, longest) int64.

        *shape*: batch x tokens of the arrays, at least as large; the rows that are missing repeat the last one.
        """
        if not rows:
            raise DataError("There is no text to encode; give at least one.")
        count, longest = shape or shape_of(rows)
        rows = [*rows, *[rows[-1]] * (count - len(rows))]
        lengths = [len(row) for row in rows]
        if self.pad_id is None and min(lengths) != longest:
            raise ModelError(
                "The tokenizer has no padding token, so texts of different lengths cannot share a batch; "
                "set pad_token in tokenizer_config.json and pad_token_id in config.json."
            )
        ids = np.full((len(rows), longest), self.pad_id or 0, dtype=np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for index, row in enumerate(rows):
            where = slice(longest - len(row), None) if self.padding_side == "left" else slice(0, len(row))
            ids[index, where], mask[index, where], types[index, where] = row.ids, 1, row.type_ids
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        known = dict(zip(INPUTS, (ids, mask, types, positions), strict=True))
        return select_inputs(known, names)

    def encode(
        self, first: Sequence[str], second: Sequence[str] | None = None, *, names: Iterable[str] = INPUTS[:3]
    ) -> dict[str, Array]:
        """tokenize and collate in one: the inputs called *names* for all texts, padded to the longest."""
        return self.collate(self.tokenize(first, second), names=names)

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of token ids, special tokens left out."""
        texts: list[str] = self._tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=True)
        return texts


def shape_of(rows: Sequence[Tokens]) -> tuple[int, int]:
    """Rows x tokens of the longest: the least that they can be collated to."""
    return len(rows), max(len(row) for row in rows)


def select_inputs(known: dict[str, Array], names: Iterable[str]) -> dict[str, Array]:
    """The arrays called *names*; raises ModelError for an input that text cannot give."""
    wanted = list(names)
    for name in wanted:
        if name not in known:
            raise ModelError(f"The model asks for the input {name}, but text only gives {', '.join(known)}.")
    return {name: known[name] for name in wanted}


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json for what older folders keep there."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            merged |= {key: value for key, value in read_json(folder / name, ModelError, REMEDY).items() if value}
    return merged


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
