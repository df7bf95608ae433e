"""The folder of a run: what lies there, what may be overwritten, and whose run it is.

DIR/config.yaml      the resolved options            DIR/checkpoints/   for --resume
DIR/metrics.jsonl    one line a logged step          DIR/model/         the result: plain weights, zeros in place
DIR/tensorboard/     the same for TensorBoard, where the tensorboard package is installed
"""

import contextlib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pst.config import START, TrainConfig
from pst.errors import RunError
from pst.files import atomic_file, read_json, refuse_existing, remove, storage_errors
from pst.settings import dump

NOT_COMPARED = {"device", "checkpoint_every", "graphs"}
"""Options that may differ between a run and its resumption."""


def finished_report(config: TrainConfig, output: Path) -> dict[str, Any] | None:
    """The sparsity.json that *output* holds already, if its run came to the end. Raises RunError for another run's."""
    report_file = output / "model" / "sparsity.json"
    if not report_file.is_file():
        return None
    remedy = "start again with --overwrite."
    report: dict[str, Any] = read_json(report_file, RunError, remedy)
    now = json.loads(json.dumps(asdict(config)))
    for name in ("config", "metrics", "seconds", "steps"):
        if name not in report:
            raise RunError(f"{report_file} does not say {name!r}, so it is not a run of this program; {remedy}")
    ignored = dict.fromkeys(NOT_COMPARED)
    require_same({**report["config"], **ignored}, {**now, **ignored}, output)
    remove(output / "checkpoints")  # a kill can have come between the result and this
    return report


def refuse_other_run(config: TrainConfig, output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise RunError where *output* holds what this run must not touch: any run, or, to resume, anything but a run.

    With *overwrite* that is what the run itself begins from.
    """
    _refuse_own_input(config, output)
    interrupted = any(output.glob("checkpoints/*.pt"))
    if interrupted and not resume and not overwrite:
        raise RunError(
            f"{output} holds a run that is not finished, which is kept; continue it with --resume, replace it with "
            "--overwrite, or choose another --output."
        )
    if resume and (interrupted or (output / "metrics.jsonl").exists() or not _visible(output)):
        return
    refuse_existing(output, overwrite=overwrite)


def _refuse_own_input(config: TrainConfig, output: Path) -> None:
    """Raise RunError where the run reads from what it would remove of *output* before it has anything in its place."""
    given = {"model": config.model, "teacher": config.teacher, "data": config.data, "validation": config.validation}
    if config.teacher == START:
        del given["teacher"]
    for name, value in given.items():
        path = Path(value).expanduser() if value else None
        if path is None or not path.exists():
            continue
        for part in ("model", "checkpoints", "tensorboard"):
            if path.resolve().is_relative_to((output / part).resolve()):
                raise RunError(
                    f"The {name} {value} lies in {output}, where this run would replace it; choose another --output."
                )


def _visible(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.glob("*"))


def require_same(stored: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raise RunError, naming up to four differences, where a run has begun as something else."""
    different = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if different:
        shown = ", ".join(
            f"{name} was {_short(stored.get(name))}, now {_short(now.get(name))}" for name in different[:4]
        )
        raise RunError(
            f"The run in {output} is from another configuration ({shown}); repeat the options of that run, "
            "give --output and --resume alone, or choose another --output."
        )


def _short(value: Any) -> str:
    """A value for a message: of a digest, its first digits."""
    return f"{value[:8]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else repr(value)


def prepare_folder(output: Path, config: TrainConfig, *, first_step: int, steps: int) -> None:
    """Make *output* a run that is about to begin, or to go on at *first_step*."""
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        for leftover in (*output.glob(".*.partial-*"), *output.glob("checkpoints/.*.partial-*")):
            remove(leftover)
        remove(output / "model" / "sparsity.json")  # first, so that a kill here leaves nothing that looks finished
        remove(output / "model")
        if first_step == 0:
            remove(output / "checkpoints")
            remove(output / "tensorboard")
        path = output / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if first_step and path.exists() else []
        with atomic_file(path) as partial:
            kept = (line for line in lines if _lies_before(line, first_step, steps))
            partial.write_text("".join(kept), encoding="utf-8")
        dump(config, output / "config.yaml")


def _lies_before(line: str, first_step: int, steps: int) -> bool:
    """Whether a logged line stays on resuming at *first_step*: a later one, and the final metrics, happen again."""
    try:
        values = json.loads(line)
    except ValueError:  # a kill cut it short
        return False
    final = "eval" in values and values["step"] == steps
    return bool(values["step"] <= first_step and not final)


@contextmanager
def open_log(output: Path, *, first_step: int) -> Iterator[Callable[..., None]]:
    """Yield ``log(step=..., name=value, ...)``, which adds a line to metrics.jsonl and points to TensorBoard."""
    with (
        storage_errors(output),
        (output / "metrics.jsonl").open("a", encoding="utf-8") as file,
        _tensorboard(output / "tensorboard", first_step) as scalar,
    ):

        def log(*, step: int, **values: Any) -> None:
            with storage_errors(output):
                file.write(json.dumps({"step": step, **values}) + "\n")
                file.flush()
                for name, value in values.items():
                    nested = value if isinstance(value, dict) else {"": value}
                    for inner, number in nested.items():
                        scalar(f"{name}/{inner}" if inner else name, number, step)

        yield log


@contextmanager
def _tensorboard(folder: Path, first_step: int) -> Iterator[Callable[[str, float, int], None]]:
    if importlib.util.find_spec("tensorboard") is None:
        yield lambda *_: None
        return
    with warnings.catch_warnings():  # its own dependencies' deprecations are nothing to our user
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(folder), purge_step=first_step or None)
    with contextlib.closing(writer):
        yield writer.add_scalar
