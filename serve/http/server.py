"""``serve``: the process around the application. What it needs beyond this package is checked before it starts."""

import asyncio
import contextlib
import errno
import importlib.util
import socket
from functools import partial
from pathlib import Path
from typing import Any

from pst.errors import ConfigError, EngineError
from serve.classify import Classifier
from serve.describe import describe
from serve.engines import ANY_SHAPE, Shapes
from serve.generate import Generator
from serve.http.batcher import BatchOptions

PACKAGES = ("starlette", "uvicorn")
BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A listening address; port 0 takes a free one. Raises ConfigError where it cannot be had."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is not a port; give --port a number from 0 (any free one) to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host} is not an address of this machine ({error}); try --host 127.0.0.1.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Without this a second server could still bind here until the first one listens.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise EngineError(
                f"Port {port} of {host} is in use; stop what listens there, or choose another with --port (0: any)."
            ) from error
        if error.errno == errno.EACCES:
            raise EngineError(f"Port {port} is not open to this user; choose one above 1023 with --port.") from error
        raise ConfigError(f"{host}:{port} cannot be listened on ({error.strerror}); try --host 127.0.0.1.") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """``http://HOST:PORT`` of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int = 0,
    max_batch_size: int = BatchOptions.max_batch_size,
    max_queue_delay_ms: float = BatchOptions.max_queue_delay_ms,
    max_queue_size: int = BatchOptions.max_queue_size,
    engine: str = "auto",
    shapes: Shapes = ANY_SHAPE,
) -> None:
    """Serve an artifact (or model) folder until SIGTERM or SIGINT; requests in flight are then finished.

    *shapes*: what the engine is to prepare for, beside all others.
    Prints ``Serving NAME at http://HOST:PORT`` to stderr once the model is ready.
    Raises ConfigError, EngineError, ArtifactError or ModelError where it cannot start.
    """
    options = BatchOptions(
        max_batch_size=max_batch_size, max_queue_delay_ms=max_queue_delay_ms, max_queue_size=max_queue_size
    )
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise EngineError(f'The package {package} is not installed; run: pip install "sparse-pst[cpu]".')
    from serve.http.classify import ClassifyService
    from serve.http.generate import GenerateService
    from serve.http.lifecycle import run

    folder = describe(path)
    opened: dict[str, Any] = {"engine": engine, "threads": threads, "shapes": shapes, "verify": True}
    with contextlib.closing(bind(host, port)) as listener:
        service: ClassifyService | GenerateService
        if folder.task == "text_generation":
            service = GenerateService(folder.name, partial(Generator, path, **opened), options)
        else:
            service = ClassifyService(folder.name, partial(Classifier, path, **opened), options)
        asyncio.run(run(service, listener, address=address_of(listener)))
