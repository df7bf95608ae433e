"""Progress with the time left, on stderr: a bar on a terminal, a line every ten seconds in a log.

Uses rich, imported on first use.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LOG_INTERVAL_S = 10.0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


_silent = False


def silence() -> None:
    """Print nothing from here on: of several processes one speaks."""
    global _silent
    _silent = True


def note(message: str) -> None:
    """Print one line for a person to stderr; stdout stays free for what can be piped."""
    if not _silent:
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: int, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield ``advance(steps=1, detail="")`` for work of *total* steps, *done* of which were made before."""
    if _silent or not sys.stderr.isatty():
        yield _log_advance(label, total, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, completed=done, detail="")

        def advance(steps: int = 1, detail: str = "") -> None:
            bar.update(task, advance=steps, detail=detail)

        yield advance


def _log_advance(label: str, total: int, done: int) -> Callable[..., None]:
    start = last = time.monotonic()
    count = done
    paced_from: tuple[float, int] | None = None
    """When the first step was made, and how far that was. It compiles and calibrates: the others are faster."""

    def left(now: float) -> str:
        since, first = paced_from or (start, done)
        if paced_from is None and (count - done) * 10 < total - done:
            return ""
        return f", {_clock((now - since) / max(count - first, 1) * (total - count))} left"

    def advance(steps: int = 1, detail: str = "") -> None:
        nonlocal last, count, paced_from
        count += steps
        now = time.monotonic()
        if (now - last >= LOG_INTERVAL_S or count >= total) and (count < total or now - start >= 2.0):
            last = now
            note(f"{label}: {count}/{total}{left(now)} {detail}".rstrip())
        paced_from = paced_from or (now, count)

    return advance
