"""A server as a process of its own, for as long as a ``with`` block lasts."""

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pst.errors import EngineError

READY = "Serving "
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0


@contextlib.contextmanager
def running_server(
    artifact: Path, *, threads: int = 0, engine: str = "auto", port: int = 0, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[str]:
    """Start ``python -m serve.http``, wait until it is ready, yield its URL, and stop it with SIGTERM.

    Raises EngineError with the server's last words where it does not start or does not stop cleanly.
    """
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}
    command = [sys.executable, "-m", "serve.http", str(artifact), "--port", str(port)]
    command += ["--threads", str(threads), "--engine", engine]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment)
    assert process.stderr is not None, "stderr is a pipe"
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stderr, lines), daemon=True)
    reader.start()
    try:
        yield _wait_until_ready(lines, start_timeout_s)
        if process.poll() is not None:
            raise EngineError(f"The server ended by itself with exit code {process.returncode}; see its output.")
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()
    if process.returncode != 0:
        raise EngineError(f"The server did not stop cleanly: exit code {process.returncode}.")


def _read(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _wait_until_ready(lines: "queue.Queue[str | None]", timeout_s: float) -> str:
    deadline, last = time.monotonic() + timeout_s, "it printed nothing"
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise EngineError(f"The server was not ready within {timeout_s:.0f} seconds; {last}.") from None
        if line is None:
            raise EngineError(f"The server did not start: {last.removeprefix('Error: ')}")
        if line.startswith(READY):
            return line.rpartition(" at ")[2]
        last = line or last
