"""``python -m serve.http ARTIFACT``: the server alone, without the command line's dependencies."""

import argparse
import sys
from pathlib import Path

from pst.errors import PSTError
from serve.http.batcher import BatchOptions
from serve.http.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Parse, serve until a signal, and return the exit code: 0 after a clean stop, 2 for a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m serve.http", description="Serve an exported classifier or language model over HTTP."
    )
    parser.add_argument("path", type=Path, help="artifact folder that pst export wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of one inference; 0: every CPU")
    parser.add_argument("--engine", default="auto", help="runtime: auto, onnxruntime, onnxruntime-cuda, torch")
    parser.add_argument("--max-batch-size", type=int, default=BatchOptions.max_batch_size, help="texts per inference")
    parser.add_argument(
        "--max-queue-delay-ms", type=float, default=BatchOptions.max_queue_delay_ms,
        help="milliseconds that a text waits for others to share its inference",
    )  # fmt: skip
    parser.add_argument(
        "--max-queue-size", type=int, default=BatchOptions.max_queue_size, help="texts that wait before 503 is answered"
    )
    try:
        serve(**vars(parser.parse_args(arguments)))
    except PSTError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the server has set its own handlers
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
