"""One server's life on an event loop: load in the background, answer, and stop cleanly on a signal."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from pst.progress import note
from serve.http.app import create_app
from serve.http.service import ModelService

STOP_TIMEOUT_S = 30
"""Seconds that requests in flight have to finish after a signal."""


class _Server(uvicorn.Server):
    """uvicorn, except that a signal which it obeyed is not raised again: a stop on request exits with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


async def run(service: ModelService[Any, Any], listener: socket.socket, *, address: str) -> None:
    """Serve on a listening socket until a signal; raises what the loading of the model raised."""
    failures: list[BaseException] = []

    async def load() -> None:
        try:
            await service.start()
        except Exception as error:
            failures.append(error)
            server.should_exit = True
            return
        if not server.should_exit:
            note(f"Serving {service.name} at {address}")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # In the background: liveness and readiness are answered while a large model loads.
        loading = asyncio.create_task(load())
        yield
        await loading
        await service.close()

    config = uvicorn.Config(
        create_app(service, lifespan=lifespan),
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )
    server = _Server(config)
    await server.serve(sockets=[listener])
    if failures:
        raise failures[0]
