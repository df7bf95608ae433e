"""Files of every kind in, the same rows out; and one sentence for each file that is not usable."""

import bz2
import gzip
import hashlib
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from pst.data import DataSpec, Examples, align_labels, in_validation, load, load_whole
from pst.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [{"sentence": f'row {i}, it\'s "{"good" if i % 2 else "bad"}"', "label": i % 2} for i in range(40)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


Write = Callable[[str, str | bytes], str]


def as_file(write: Write, name: str, rows: list[Any]) -> str:
    frame = importlib.import_module("pandas").DataFrame(rows)
    if name.endswith(".jsonl"):
        return write(name, jsonl(rows))
    if name.endswith(".json"):
        return write(name, json.dumps(rows))
    if name.endswith(".parquet"):
        path = write(name, b"")
        frame.to_parquet(path, index=False)
        return path
    if name.endswith(".tsv"):
        return write(name, "sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows))
    text = frame.to_csv(index=False).encode()
    if name.endswith(".gz"):
        text = gzip.compress(text)
    return write(name, bz2.compress(text) if name.endswith(".bz2") else text)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.csv.bz2", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(write: Write, name: str) -> None:
    examples = load_whole(DataSpec(data=as_file(write, name, ROWS)))
    assert examples.first == [row["sentence"] for row in ROWS]
    assert examples.second is None
    assert examples.labels.tolist() == [row["label"] for row in ROWS]
    assert examples.labels.dtype == np.int64
    assert examples.task == "classification"
    assert examples.label_names is None
    assert examples.fingerprint == load_whole(DataSpec(data=as_file(write, "b.jsonl", ROWS))).fingerprint


def test_a_single_file_is_split_by_the_hash_of_its_text(write: Write) -> None:
    rows = [*ROWS * 10, *ROWS]  # every text eleven times
    path = as_file(write, "a.jsonl", rows)
    train = load(DataSpec(data=path, validation_fraction=0.3), split="train")
    validation = load(DataSpec(data=path, validation_fraction=0.3), split="validation")
    assert len(train) + len(validation) == len(rows)
    assert not set(train.first) & set(validation.first)
    for text in validation.first:  # the rule as documented
        assert int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.3
    assert not any(in_validation(text, 0.3) for text in train.first)
    assert 0.1 < len(validation) / len(rows) < 0.5


def test_pairs_are_split_by_both_texts(write: Write) -> None:
    rows = [{"sentence1": "the same", "sentence2": f"other {i}", "label": i % 2} for i in range(200)]
    validation = load(DataSpec(data=as_file(write, "a.jsonl", rows)), split="validation")
    assert validation.second is not None
    assert 5 < len(validation) < 40


def test_a_folder_codes_the_validation_labels_as_the_training_labels(write: Write) -> None:
    write("d/train.csv", "text,label\na,no\nb,yes\nc,maybe\n")
    path = write("d/dev.jsonl", jsonl([{"text": "d", "label": "yes"}]))
    spec = DataSpec(data=str(Path(path).parent))
    train, validation = load(spec, split="train"), load(spec, split="validation")
    assert train.label_names == validation.label_names == ("maybe", "no", "yes")
    assert train.labels.tolist() == [1, 2, 0]
    assert validation.labels.tolist() == [2]
    assert train.num_labels == 3


def test_test_rows_are_the_last_choice_for_validation(write: Write) -> None:
    write("d/train.jsonl", jsonl(ROWS))
    folder = str(Path(write("d/test.jsonl", jsonl(ROWS[:7]))).parent)
    assert len(load(DataSpec(data=folder), split="validation")) == 7
    write("d/validation.jsonl", jsonl(ROWS[:5]))
    assert len(load(DataSpec(data=folder), split="validation")) == 5
    assert len(load_whole(DataSpec(data=folder))) == 5


def test_a_folder_without_validation_rows_is_split_like_a_file(write: Write) -> None:
    folder = str(Path(write("d/train.jsonl", jsonl(ROWS))).parent)
    whole = load(DataSpec(data=f"{folder}/train.jsonl"), split="validation")
    assert (
        load(DataSpec(data=folder), split="validation").first == whole.first == load_whole(DataSpec(data=folder)).first
    )


def test_a_file_of_its_own_for_validation(write: Write) -> None:
    spec = DataSpec(data=as_file(write, "a.csv", ROWS), validation=as_file(write, "b.jsonl", ROWS[:3]))
    assert (len(load(spec, split="train")), len(load(spec, split="validation"))) == (40, 3)


def test_columns_are_found_or_named(write: Write) -> None:
    rows = [{"sentence": "x", "question": "q", "note": "n", "grade": i % 2, "label": "abc"[i % 3]} for i in range(6)]
    path = as_file(write, "a.jsonl", rows)
    pair = load_whole(DataSpec(data=path))
    assert (pair.first[0], pair.second and pair.second[0]) == ("q", "x")
    named = load_whole(DataSpec(data=path, text_columns=("note",), label_column="grade"))
    assert (named.first[0], named.second, named.labels.tolist()) == ("n", None, [0, 1] * 3)


def test_csv_cells_stay_the_text_that_they_are(write: Write) -> None:
    path = write("a.csv", 'text,label\nNA,0\n007,1\nnull,1\n"a, ""b""\nc",0\n')
    assert load_whole(DataSpec(data=path)).first == ["NA", "007", "null", 'a, "b"\nc']


def test_scores_mean_regression_also_where_validation_has_whole_ones(write: Write) -> None:
    write("d/train.jsonl", jsonl([{"text": "a", "score": 0.5}, {"text": "b", "score": 3}]))
    folder = str(Path(write("d/validation.jsonl", jsonl([{"text": "c", "score": 5.0}]))).parent)
    train = load(DataSpec(data=folder), split="train")
    assert train.labels.dtype == np.float32
    assert (train.task, train.num_labels) == ("regression", 1)
    validation = load(DataSpec(data=folder), split="validation")
    assert (validation.task, validation.labels.tolist()) == ("regression", [5.0])
    whole = load_whole(DataSpec(data=folder))
    aligned = align_labels(whole, label2id={}, num_labels=1, task="regression", where="m")
    assert (aligned.task, aligned.labels.tolist()) == ("regression", [5.0])


def test_limit_spreads_over_the_rows(write: Write) -> None:
    rows = sorted(ROWS, key=lambda row: int(str(row["label"])))  # all of one class, then all of the other
    examples = load_whole(DataSpec(data=as_file(write, "a.jsonl", rows), limit=8))
    assert examples.labels.tolist() == [0] * 4 + [1] * 4


def test_subset_keeps_order_and_changes_the_fingerprint(write: Write) -> None:
    examples = load_whole(DataSpec(data=as_file(write, "a.jsonl", ROWS)))
    part = examples.subset([3, 1])
    assert part.first == [ROWS[3]["sentence"], ROWS[1]["sentence"]]
    assert part.labels.tolist() == [1, 1]
    assert part.fingerprint != examples.fingerprint == examples.subset(range(40)).fingerprint


def test_nothing_stays_behind_and_nothing_is_printed(write: Write, tmp_path: Path) -> None:
    path = as_file(write, "a.csv.bz2", ROWS)
    (tmp_path / "t").mkdir()
    code = f"from pst.data import *; print(len(load_whole(DataSpec(data={path!r}))))"
    environment = {"HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "t"), "HOME": str(tmp_path / "h")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("40\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv.bz2", "t"]
    assert not any((tmp_path / "t").iterdir())


def test_the_module_needs_neither_torch_nor_datasets() -> None:
    heavy = {"torch", "transformers", "datasets"}
    code = f"import sys, pst.data, pst.metrics, pst.settings; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


GOOD = '{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 1}\n'

REFUSED: list[tuple[str, str, str | bytes, dict[str, Any], str]] = [
    ("empty", "a.jsonl", "", {}, "a.jsonl is empty"),
    ("blank lines", "a.jsonl", "\n\n", {}, "a.jsonl has no rows"),
    ("header alone", "a.csv", "text,label\n", {}, "a.csv has no rows"),
    ("ending", "a.xlsx", "x", {}, "unsupported ending"),
    ("cut short", "a.jsonl", GOOD[:-9], {}, "a.jsonl cannot be read as jsonl"),
    ("not utf-8", "a.jsonl", GOOD.replace("b", "é").encode("latin-1"), {}, "a.jsonl is not encoded as UTF-8; save it"),
    (
        "csv not utf-8",
        "a.csv",
        "text,label\né,0\nb,1\n".encode("latin-1"),
        {},
        "a.csv is not encoded as UTF-8; save it",
    ),
    ("open quote", "a.csv", 'text,label\n"abc,0\n', {}, "a.csv cannot be read as csv"),
    ("ragged", "a.csv", "text,label\na,0\nb,1,2\n", {}, "Expected 2 fields in line 3, saw 3"),
    ("wide", "a.csv", "text,label\na, b,0\nc, d,1\n", {}, "Row 1 of .* has 3 cells, but its header names 2 .*quotes"),
    ("two of a name", "a.csv", "text,label,text\na,0,b\nc,1,d\n", {}, "names the column 'text' twice; rename one"),
    ("comma at the end", "a.csv", "text,label\na,0,\nb,1,\n", {}, "Row 1 of .* has 3 cells, but its header names 2"),
    ("wide", "a.tsv", "text\tlabel\na\tb\t0\nc\td\t1\n", {}, "Row 1 of .* has 3 cells.*remove the tabs"),
    ("damaged bz2", "a.csv.bz2", bz2.compress(b"text,label\na,0\nb,1\n")[:30], {}, "a.csv.bz2 cannot be read"),
    ("no parquet", "a.parquet", "PAR1 or not", {}, "a.parquet cannot be read as parquet"),
    ("text column", "a.jsonl", GOOD, {"text_columns": ("x",)}, r"Column 'x' is not in .* \(it has sentence, label\)"),
    ("label column", "a.jsonl", GOOD, {"label_column": "y"}, r"Column 'y' is not in .* \(it has sentence, label\)"),
    ("no usual text", "a.csv", "a,label\nx,0\n", {}, "no column with a usual name for text .it has a, label."),
    ("no usual label", "a.csv", "text,b\nx,0\n", {}, "no column with a usual name for labels .it has text, b."),
    ("empty text", "a.csv", "text,label\nx,0\n  ,1\n", {}, "Row 2 of .* has an empty text"),
    ("null text", "a.jsonl", GOOD + '{"sentence": null, "label": 0}\n', {}, "Row 3 of .* has no text"),
    ("no text", "a.jsonl", '{"text": 1.5, "label": 0}\n{"text": 2.5, "label": 1}\n', {}, "holds float values"),
    ("empty label", "a.csv", "text,label\nx,0\ny,\n", {}, "Row 2 of .* has no label"),
    ("null label", "a.jsonl", GOOD + '{"sentence": "c"}\n', {}, "Row 3 of .* has no label"),
    ("infinite label", "a.csv", "text,label\nx,0.5\ny,inf\n", {}, "Row 2 of .* has the label inf"),
    ("mixed labels", "a.jsonl", GOOD + '{"sentence": "c", "label": "x"}\n', {}, "mixes or holds int and str"),
    ("one class", "a.csv", "text,label\nx,yes\ny,yes\n", {}, "Every row of .* has the label 'yes'"),
    ("one score", "a.csv", "text,score\nx,0.5\ny,0.5\n", {}, "Every row of .* has the score 0.5"),
    ("negative", "a.csv", "text,label\nx,-1\ny,0\n", {}, "label -1 .-1 marks hidden labels."),
    ("gap", "a.csv", "text,label\nx,0\ny,2\n", {}, "are 0, 2; number them 0 to 1 without a gap"),
    (
        "not labels",
        "a.jsonl",
        jsonl([{"text": "t", "label": f"n{i}"} for i in range(1500)]),
        {},
        "not look like labels",
    ),
    ("no rows left", "a.jsonl", GOOD, {"validation_fraction": 1e-9}, "too few rows .2. for a validation split"),
    ("missing validation", "a.jsonl", GOOD, {"validation": "nowhere.csv"}, "nowhere.csv does not exist"),
]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refusals(write: Write, name: str, content: str | bytes, options: dict[str, Any], message: str) -> None:
    spec = DataSpec(data=write(name, content), **options)
    with pytest.raises(DataError, match=message) as caught:
        load(spec, split="validation")
    assert "\n" not in str(caught.value)


def test_refusals_of_paths(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.csv does not exist"):
        load(DataSpec(data="nothing.csv"), split="train")
    with pytest.raises(DataError, match="does not exist"):
        load(DataSpec(data="./nothing"), split="train")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="holds no train file"):
        load(DataSpec(data=str(tmp_path / "d")), split="train")
    write("d/train.csv", "text,label\nx,0\ny,1\n")
    write("d/train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"holds train.csv, train.jsonl; keep one"):
        load(DataSpec(data=str(tmp_path / "d")), split="train")


def test_a_validation_label_that_no_training_row_has(write: Write) -> None:
    write("d/train.csv", "text,label\na,no\nb,yes\n")
    folder = str(Path(write("d/validation.csv", "text,label\nc,perhaps\n")).parent)
    with pytest.raises(DataError, match=r"Row 1 .* the label 'perhaps', which no training row has"):
        load(DataSpec(data=folder), split="validation")
    write("d/validation.csv", "text,label\nc,1\n")
    with pytest.raises(DataError, match=r"holds other values \(1\) than in the training rows"):
        load(DataSpec(data=folder), split="validation")


@pytest.mark.parametrize("options", [{"validation_fraction": 0.0}, {"limit": -1}, {"text_columns": ("a", "b", "c")}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DataSpec(data="x.csv", **options)


def examples_of(write: Write, *labels: object) -> Examples:
    rows = [{"text": f"t{number}", "label": label} for number, label in enumerate(labels)]
    return load_whole(DataSpec(data=write("labels.jsonl", jsonl(rows))))


def test_names_go_through_the_model(write: Write) -> None:
    examples = examples_of(write, "pos", "neg", "pos")
    aligned = align_labels(examples, label2id={"POS": 0, "NEG": 1}, num_labels=2, task="classification", where="m")
    assert aligned.labels.tolist() == [0, 1, 0]
    assert aligned.label_names == ("POS", "NEG")
    nameless = {"LABEL_0": 0, "LABEL_1": 1}
    assert align_labels(
        examples, label2id=nameless, num_labels=2, task="classification", where="m"
    ).labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="label 'neg', which m does not know"):
        align_labels(examples, label2id={"pos": 0, "bad": 1}, num_labels=2, task="classification", where="m")
    with pytest.raises(DataError, match="does not know"):  # one class of three is missing: their order is not certain
        align_labels(examples, label2id={**nameless, "LABEL_2": 2}, num_labels=3, task="classification", where="m")


def test_numbers_must_fit_the_model(write: Write) -> None:
    two = {"a": 0, "b": 1}
    assert align_labels(examples_of(write, 1, 1), label2id=two, num_labels=2, task="classification", where="m")
    with pytest.raises(DataError, match=r"more labels than the checkpoint m has \(2\)"):
        align_labels(examples_of(write, 0, 2), label2id=two, num_labels=2, task="classification", where="m")
    with pytest.raises(DataError, match="holds scores"):
        align_labels(examples_of(write, 0.5, 2), label2id=two, num_labels=2, task="classification", where="m")
    with pytest.raises(DataError, match="predicts a score"):
        align_labels(examples_of(write, "x", "y"), label2id={}, num_labels=1, task="regression", where="m")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )

    def rows(*labels: int) -> Any:
        return datasets.Dataset.from_dict({"text": [f"t{n}" for n in labels], "label": labels}, features=features)

    splits = datasets.DatasetDict(train=rows(0, 1, 0), validation=rows(1), unsupervised=rows(1, 1))

    def load_dataset(name: str, config: str | None = None) -> Any:
        asked.append((name, config))
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train = load(DataSpec(data="glue/sst2"), split="train")
    assert (train.label_names, train.labels.tolist()) == (("negative", "positive"), [0, 1, 0])
    assert len(load_whole(DataSpec(data="imdb"))) == 1
    assert len(load(DataSpec(data="org/name", validation="unsupervised"), split="validation")) == 2
    load(DataSpec(data="org/name/config"), split="train")
    assert asked == [("glue", "sst2"), ("imdb", None), ("org/name", None), ("org/name", "config")]
    with pytest.raises(DataError, match="has no split named dev"):
        load(DataSpec(data="imdb", validation="dev"), split="validation")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    code = """
from pst.data import DataSpec, load
try:
    load(DataSpec(data="org/nothing"), split="train")
except Exception as error:
    print(repr(error))
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("DataError(")
    assert "org/nothing is no file or folder here" in done.stdout
    assert done.stderr == "Loading org/nothing from the hub or its cache.\n"


@pytest.mark.parametrize(
    ("name", "train", "validation", "pairs"),
    [("cola", 8551, 1043, False), ("sst2", 67349, 872, False), ("mrpc", 3668, 408, True)],
)
def test_real_data(name: str, train: int, validation: int, pairs: bool) -> None:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    examples = load(DataSpec(data=str(folder)), split="train")
    assert (len(examples), examples.num_labels, examples.second is not None) == (train, 2, pairs)
    assert len(load(DataSpec(data=str(folder)), split="validation")) == validation
