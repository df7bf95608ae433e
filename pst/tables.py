"""Tables of named columns out of local files, through ``datasets``, or from the hub.

    .jsonl .json .csv .tsv     each also .gz, .bz2, .xz
    .parquet

Local files are read without a network, and nothing stays behind in a cache. ``datasets`` is imported inside the
functions.
"""

import contextlib
import errno
import importlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst.errors import DataError, StorageError
from pst.progress import note

FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".bz2", ".xz")
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "validation_matched", "test")
COLLECTIONS = frozenset({"glue", "super_glue", "tweet_eval", "paws", "anli", "xnli"})  # "glue/sst2" is a configuration


@dataclass(frozen=True)
class Table:
    """Columns as read; ``names`` are the class names that the file's own schema gives to a column."""

    columns: dict[str, list[Any]]
    names: dict[str, tuple[str, ...]]
    where: str
    typed: bool  # False: every cell is a string and a label's type must be guessed

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


def listed(names: Iterable[object], *, most: int = 12) -> str:
    """Names for a message: the first *most*, and how many more."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def local(data: str) -> Path | None:
    """*data* as a path when it exists or cannot be a hub id, else None."""
    path = Path(data).expanduser()
    looks_like_path = path.is_absolute() or data.startswith((".", "~")) or data.endswith("/") or ending_of(path) != ""
    if path.exists():
        return path
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", data):
        raise DataError(
            f"{data} does not exist; give a data file, a folder with train and validation files, or a hub id."
        )
    return None


def ending_of(path: Path) -> str:
    """The ending that says how to read *path*, such as ".csv" for reviews.csv.bz2, or "" for an unsupported one."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    if name.suffix not in FORMATS or (name is not path and name.suffix == ".parquet"):
        return ""
    return name.suffix


def read_splits(data: str, validation: str, want: Collection[str]) -> tuple[dict[str, Table], bool]:
    """The tables of *want* ("train", "validation") that *data* has, and whether it gives no rows for validation.

    *validation* names a file, or another split of a hub id. Without rows for validation the table "train" is read
    whatever *want* says. Raises DataError where something is not there.
    """
    path = local(data)
    if path is None:
        return _read_hub(data, validation, want)
    other = local(validation) if validation else None
    if validation and other is None:
        raise DataError(f"{validation} does not exist; give the file with the validation rows.")
    files: dict[str, Path | None]
    if path.is_file():
        files = {"train": path, "validation": other}
    else:
        found = other or next((file for name in VALIDATION_NAMES if (file := _find(path, name))), None)
        files = {"train": _find(path, "train"), "validation": found}
    cut = files["validation"] is None
    tables = {}
    for name in ("train",) if cut else want:
        file = files[name]
        if file is None:
            raise DataError(
                f"{path} holds no {name} file; a data folder has train.ENDING and validation.ENDING, "
                f"ENDING being one of {listed(FORMATS)}."
            )
        tables[name] = read_file(file)
    return tables, cut


def _find(folder: Path, name: str) -> Path | None:
    files = [path for path in sorted(folder.glob(f"{name}.*")) if path.is_file() and ending_of(path)]
    files = [path for path in files if path.name.split(".")[0] == name]
    if len(files) > 1:
        raise DataError(f"{folder} holds {listed(path.name for path in files)}; keep one of them.")
    return files[0] if files else None


def read_file(path: Path) -> Table:
    """All rows of a local file. Raises DataError where it is empty, damaged, or of a kind that is not read."""
    ending = ending_of(path)
    if not ending:
        raise DataError(f"{path} has an unsupported ending; {listed(FORMATS)} are read, also as .csv.gz or .csv.bz2.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; give a file with rows of text and labels.")
    datasets = _datasets()
    options: dict[str, Any] = {}
    with _quiet(datasets), _readable(path), tempfile.TemporaryDirectory(prefix="pst-data-") as cache:
        if FORMATS[ending] == "csv":
            options = _csv_options(path, datasets, ending)
        rows = datasets.load_dataset(
            FORMATS[ending], data_files={"rows": str(path)}, split="rows", cache_dir=cache, **options
        )
        table = _to_table(rows, datasets, str(path), typed=FORMATS[ending] != "csv")
        del rows  # its memory map, before the folder goes
    return table


def _csv_options(path: Path, datasets: Any, ending: str) -> dict[str, Any]:
    """Every cell as the string that stands there: "NA" is a text, and a column of digits may be one as well.

    A tab-separated file has no quoting, as its media type has it: a quote that opens a text would swallow rows.
    Raises DataError where the first row has more cells than the header, or the header names a column twice.
    """
    pandas = importlib.import_module("pandas")
    options = {"sep": "\t", "quoting": 3} if ending == ".tsv" else {"sep": ","}
    first = pandas.read_csv(path, nrows=1, dtype=str, **options)
    header = list(first.columns)
    if not isinstance(first.index, pandas.RangeIndex):  # pandas moves every name to the right
        remedy = "remove the tabs in its texts" if ending == ".tsv" else "put texts that hold a comma in double quotes"
        cells = first.index.nlevels + len(header)
        raise DataError(f"Row 1 of {path} has {cells} cells, but its header names {len(header)} columns; {remedy}.")
    written = pandas.read_csv(path, nrows=1, header=None, dtype=str, keep_default_na=False, **options).iloc[0].tolist()
    twice = next((name for name in written if name and written.count(name) > 1), None)
    if twice is not None:  # pandas numbers the second
        raise DataError(f"The header of {path} names the column {twice!r} twice; rename one of the two.")
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"features": features, "keep_default_na": False, **options}


def _read_hub(data: str, validation: str, want: Collection[str]) -> tuple[dict[str, Table], bool]:
    datasets = _datasets()
    parts = data.split("/")
    repository, config = data, None
    if len(parts) == 3 or (len(parts) == 2 and parts[0] in COLLECTIONS):
        repository, config = "/".join(parts[:-1]), parts[-1]
    note(f"Loading {data} from the hub or its cache.")
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # five retries, each announced, before the one sentence below
    try:
        splits = datasets.load_dataset(repository, config)
    except Exception as error:  # the hub's client raises a dozen kinds; the remedy is the same
        raise DataError(
            f"{data} is no file or folder here and could not be loaded from the hub ({_first_line(error)}); "
            "check the name and the network, or give a local file."
        ) from error
    finally:
        log.setLevel(level)
    found = validation or next((name for name in VALIDATION_NAMES if name in splits), "")
    tables = {}
    for name in want if found else ("train",):
        split = found if name == "validation" else name
        if split not in splits:
            raise DataError(f"{data} has no split named {split} (it has {listed(splits)}); choose other data.")
        tables[name] = _to_table(splits[split], datasets, f"{data}, split {split}", typed=True)
    return tables, not found


def _to_table(rows: Any, datasets: Any, where: str, *, typed: bool) -> Table:
    if len(rows) == 0:
        raise DataError(f"{where} has no rows; give a file with rows of text and labels.")
    names = {
        column: tuple(feature.names)
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return Table({column: rows[column][:] for column in rows.column_names}, names, where, typed)


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            "Reading data needs the package datasets, which is not installed; add it with pip install datasets."
        ) from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no log lines from ``datasets``: what it has to say comes as an exception."""
    bars, level = datasets.utils.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises over the content of *path* into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow, pandas, datasets and the decompressors share no base class
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                f"No space is left in {tempfile.gettempdir()} to read {path}; free some, or set TMPDIR elsewhere."
            ) from error
        if isinstance(cause, UnicodeDecodeError):
            raise DataError(f"{path} is not encoded as UTF-8; save it as UTF-8.") from error
        if "corresponds to no data" in str(cause):
            raise DataError(f"{path} has no rows; give a file with rows of text and labels.") from error
        raise DataError(
            f"{path} cannot be read as {ending_of(path).lstrip('.')} ({_first_line(cause)}); "
            "it may be damaged or cut short: make it again, or name it by its real format."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
