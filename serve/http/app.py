"""The HTTP transport: health, the model's description, and one path to ask, whatever the model's Service says there.

    GET  /v2/health/live           200 once the process listens
    GET  /v2/health/ready          200 once the model is loaded and warm, 503 before and while stopping
    GET  /v2/models/{name}         the model's inputs, outputs, labels and sparsity
    GET  /v2/models/{name}/ready   readiness of this model
    POST /v1/classify              of a classifier: serve/http/classify.py
    POST /v1/generate              of a language model: serve/http/generate.py

The health and model paths are those of the Open Inference Protocol, version 2.
"""

import json
from collections.abc import Collection
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Lifespan

from serve.http.errors import HANDLERS, RequestError, error_response, unavailable

MAX_BODY_BYTES = 1 << 20


class Service(Protocol):
    """What the transport needs of a model."""

    name: str
    path: str
    """Where it is asked by POST."""

    @property
    def ready(self) -> bool: ...

    def metadata(self) -> dict[str, Any]: ...

    def parse(self, body: bytes) -> Any:
        """The question in a body. Raises RequestError."""
        ...

    async def respond(self, question: Any, request: Request) -> Response:
        """The answer to what parse gave. May raise RequestError, DataError, QueueFullError and ClosedError."""
        ...


def create_app(service: Service, *, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """The application for one model."""
    not_ready = f"{service.name} is not ready; ask /v2/health/ready until it is."

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        if not _is_ours(request, service):
            return _unknown(request, service)
        return JSONResponse({"ready": True}) if service.ready else unavailable(not_ready)

    async def model(request: Request) -> Response:
        if not _is_ours(request, service):
            return _unknown(request, service)
        return JSONResponse(service.metadata()) if service.ready else unavailable(not_ready)

    async def ask(request: Request) -> Response:
        question = service.parse(await read_body(request))
        return await service.respond(question, request) if service.ready else unavailable(not_ready)

    routes = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/{name}", model),
        Route("/v2/models/{name}/ready", ready),
        Route(service.path, ask, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers=HANDLERS, lifespan=lifespan)


def _is_ours(request: Request, service: Service) -> bool:
    return bool(request.path_params.get("name", service.name) == service.name)


def _unknown(request: Request, service: Service) -> Response:
    return error_response(404, f"{request.path_params['name']} is not served here; this is {service.name}.")


async def read_body(request: Request) -> bytes:
    """The whole body; raises RequestError 413 as soon as it is longer than MAX_BODY_BYTES."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"The body is longer than {MAX_BODY_BYTES} bytes; send fewer texts.", status=413)
    return bytes(body)


def parse_object(body: bytes, *, fields: Collection[str]) -> dict[str, Any]:
    """A body's JSON object, all keys among *fields*; raises RequestError that says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError('The body is not JSON; send {"text": "..."}.') from error
    if not isinstance(request, dict):
        raise RequestError('The body must be a JSON object such as {"text": "..."}.')
    unknown = [key for key in request if key not in fields]
    if unknown:
        *names, last = fields
        raise RequestError(f"The field {unknown[0]!r} is unknown; the fields are {', '.join(names)} and {last}.")
    return request


def parse_strings(value: object, field: str, *, most: int, blank: bool = False) -> list[str]:
    """The text or texts of a field, *most* at most; raises RequestError for what is none, empty or no Unicode.

    *blank*: white space alone is a text as well.
    """
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values:
        raise RequestError(f"The field {field} is an empty list; send at least one text.")
    if len(values) > most:
        raise RequestError(f"{len(values)} texts are too many for one request; send {most} at most.")
    for text in values:
        if not isinstance(text, str):
            raise RequestError(f"The field {field} must be a string or a list of strings.")
        if not (text if blank else text.strip()):
            raise RequestError(f"The field {field} holds an empty text; send one with words.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"The field {field} holds half of a surrogate pair, which is not Unicode.") from error
    return values
