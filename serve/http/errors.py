"""Errors to statuses. Every error's body is ``{"error": "one sentence"}``.

400  the request: not JSON, wrong field or type, empty text          413  the body is too long
404  no such path or model      405  wrong method                    500  a defect here; the log has its trace
503  not ready, stopping, or the queue is full; Retry-After says when to come back
"""

import math

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from pst.errors import DataError
from serve.http.batcher import QueueFullError
from serve.http.worker import ClosedError

FAILED = "The server failed to answer; its log says why."


class RequestError(Exception):
    """The client's request cannot be answered; *status* is 400 unless said."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def error_response(status: int, message: str, *, headers: dict[str, str] | None = None) -> JSONResponse:
    """The one form of an error's body."""
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def unavailable(message: str, *, retry_after_s: float = 1.0) -> JSONResponse:
    """503 with Retry-After in whole seconds, one at least."""
    return error_response(503, message, headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error.status, str(error))


def _data_error(request: Request, error: Exception) -> Response:
    return error_response(400, str(error))


def _queue_full(request: Request, error: Exception) -> Response:
    assert isinstance(error, QueueFullError)
    return unavailable("The queue is full; try again later.", retry_after_s=error.retry_after_s)


def _closed(request: Request, error: Exception) -> Response:
    return unavailable("The server is stopping; ask another one.")


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"There is nothing at {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    headers = dict(error.headers) if error.headers else None
    return error_response(error.status_code, messages.get(error.status_code, error.detail), headers=headers)


def _gone(request: Request, error: Exception) -> Response:
    return error_response(400, "The connection closed before the whole body had come.")


def _defect(request: Request, error: Exception) -> Response:
    return error_response(500, FAILED)


HANDLERS = {
    RequestError: _request_error,
    DataError: _data_error,
    QueueFullError: _queue_full,
    ClosedError: _closed,
    HTTPException: _http_exception,
    ClientDisconnect: _gone,
    Exception: _defect,
}
"""For Starlette's ``exception_handlers``."""
