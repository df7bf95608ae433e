"""What the commands of pst share: options that mean the same everywhere, and how a result is printed."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pst.errors import StorageError

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the result; must not hold one already.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result that --output already holds.")]

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one option; may be repeated.")]

DataSets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="How to read --data: text_columns, label_column, validation, validation_fraction or limit; "
        "may be repeated.",
    ),
]

Threads = Annotated[int, typer.Option(min=0, help="Processor threads of one inference; 0 = all this process may use.")]

EngineName = Annotated[
    str, typer.Option(help="Runtime: auto, onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx, torch or torch-cuda.")
]

DataOption = Annotated[
    str | None,
    typer.Option("--data", help="glue/TASK, a hub id, a .jsonl/.csv/.tsv/.parquet file, or a folder."),
]


def data_spec(data: str | None, sets: Sequence[str] | None) -> Any:
    """A DataSpec from --data and --set, or None without --data."""
    from pst.data import DataSpec
    from pst.settings import resolve

    if data is None and not sets:
        return None
    return resolve(DataSpec, sets=sets or (), flags={"data": data})


def as_json(value: object) -> str:
    """For a person to read and a program to parse."""
    import json

    return json.dumps(value, indent=2)


def show(text: str) -> None:
    """Print a result. That its reader has gone (``| head``) is no error; that it cannot be written (``> FILE``) is."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is left in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise StorageError(f"The output cannot be written: {error.strerror}. Send it elsewhere.") from error
