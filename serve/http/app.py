"""The HTTP transport: paths, bodies and statuses. What is answered comes from a Service.

    GET  /v2/health/live           200 once the process listens
    GET  /v2/health/ready          200 once the model is loaded and warm, 503 before and while stopping
    GET  /v2/models/{name}         the model's inputs, outputs, labels and sparsity
    GET  /v2/models/{name}/ready   readiness of this model
    POST /v1/classify              {"text": "..."} or {"text": ["...", ...]}; for pairs "text_pair" in the same form
                                   -> {"model": name, "predictions": [{"label", "score", "scores"} or {"value"}, ...]}

A text longer than the model's max_length is cut, as in training. An empty text is refused: its answer would mean
nothing. The health and model paths are those of the Open Inference Protocol, version 2.
"""

import json
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Lifespan

from serve.classify import Prediction
from serve.http.errors import HANDLERS, RequestError, error_response, unavailable

MAX_BODY_BYTES = 1 << 20
FIELDS = ("text", "text_pair")
TextPair = tuple[str, str | None]


class Service(Protocol):
    """What the transport needs of a model. ``ask`` may raise DataError, QueueFullError and ClosedError."""

    name: str
    max_texts: int

    @property
    def ready(self) -> bool: ...

    def metadata(self) -> dict[str, Any]: ...

    async def ask(self, texts: list[TextPair]) -> list[Prediction]: ...


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

    async def classify(request: Request) -> Response:
        texts = parse_texts(await read_body(request), max_texts=service.max_texts)
        if not service.ready:
            return unavailable(not_ready)
        predictions = await service.ask(texts)
        return JSONResponse({"model": service.name, "predictions": [answer.to_json() for answer in predictions]})

    routes = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/{name}", model),
        Route("/v2/models/{name}/ready", ready),
        Route("/v1/classify", classify, methods=["POST"]),
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


def parse_texts(body: bytes, *, max_texts: int) -> list[TextPair]:
    """The texts, or pairs, of a request's JSON; raises RequestError that says what is wrong with it."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError('The body is not JSON; send {"text": "..."}.') from error
    if not isinstance(request, dict):
        raise RequestError('The body must be a JSON object such as {"text": "..."}.')
    unknown = [key for key in request if key not in FIELDS]
    if unknown:
        raise RequestError(f"The field {unknown[0]!r} is unknown; the fields are text and text_pair.")
    if "text" not in request:
        raise RequestError('The field text is missing; send {"text": "..."}.')
    first = _strings(request["text"], "text")
    if len(first) > max_texts:
        raise RequestError(f"{len(first)} texts are too many for one request; send {max_texts} at most.")
    if "text_pair" not in request:
        return [(text, None) for text in first]
    second = _strings(request["text_pair"], "text_pair")
    if len(second) != len(first) or isinstance(request["text"], str) != isinstance(request["text_pair"], str):
        raise RequestError("text and text_pair must have the same form: two strings, or two lists of the same length.")
    return list(zip(first, second, strict=True))


def _strings(value: object, field: str) -> list[str]:
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values:
        raise RequestError(f"The field {field} is an empty list; send at least one text.")
    for text in values:
        if not isinstance(text, str):
            raise RequestError(f"The field {field} must be a string or a list of strings.")
        if not text.strip():
            raise RequestError(f"The field {field} holds an empty text; send one with words.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"The field {field} holds half of a surrogate pair, which is not Unicode.") from error
    return values
