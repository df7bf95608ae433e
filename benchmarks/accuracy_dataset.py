"""One data set of benchmarks/accuracy.py in a process of its own: ``python -m benchmarks.accuracy_dataset JSON``.

JSON holds the arguments of pst.compare.compare. Exits with 0, with 2 after an error that it has printed, and with 130
when it was told to stop, by SIGTERM or by the end of its standard input.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from pst.compare import compare
from pst.compare.worker import stop_with_the_parent
from pst.errors import PSTError


def main(arguments: str) -> int:
    """Compare, and return the exit code."""
    threading.Thread(target=stop_with_the_parent, daemon=True).start()
    values: dict[str, Any] = json.loads(arguments)
    from pst.train import InterruptedRun

    try:
        compare(**values | {"output": Path(values["output"])})
    except PSTError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except InterruptedRun as stop:
        print(stop, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
