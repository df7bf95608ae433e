"""One run of a comparison in a process of its own: ``python -m pst.compare.worker FOLDER CONFIG``, CONFIG as JSON.

Prints one JSON object, {"error": sentence or null, "storage": sentence or null}, and exits with 0; with 130 when it was
told to stop, by SIGTERM or by the end of its standard input.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from pst.compare.attempt import attempt
from pst.config import TrainConfig
from pst.errors import StorageError


def main(folder: str, config: str) -> int:
    """Train, answer, and return the exit code."""
    threading.Thread(target=stop_with_the_parent, daemon=True).start()
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(config).items()
    }
    answer: dict[str, str | None] = {"error": None, "storage": None}
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as pipe:
        os.dup2(2, 1)  # what libraries print goes to the log, not into the answer
        from pst.train import InterruptedRun

        try:
            answer["error"] = attempt(TrainConfig(**values), Path(folder))
        except StorageError as error:
            answer["storage"] = str(error)
        except InterruptedRun:
            return 130
        pipe.write(json.dumps(answer))
    return 0


def stop_with_the_parent() -> None:
    """SIGTERM to this process when its standard input ends, as it does with whoever started it."""
    while os.read(0, 4096):  # not sys.stdin, whose lock an ending interpreter would wait for
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
