"""Signals that ask a run to stop, and leave it the time to do so in order."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within: SIGINT and SIGTERM only set a flag, which the yielded function reads."""
    asked = False

    def ask(*_: Any) -> None:
        nonlocal asked
        asked = True

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: whoever owns it handles signals
            break
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
