"""A language model behind HTTP.

    POST /v1/generate   {"text": "..."}, or "prompt" in its place, or a list of texts
                        "max_new_tokens": 64   tokens of an answer at most
                        "stop": "..." or [...] texts that end an answer, and are cut off
                        "temperature": 0, "top_p": 1, "seed": null    serve/sampling.py; 0 takes the likeliest token
                        "stream": false
                        -> {"model": name, "generations": [{"text", "prompt_tokens", "new_tokens", "finish_reason"}]}

finish_reason is stop (the end-of-text token, or a stop text) or length (max_new_tokens). With "stream": true, for one
text, the answer is server-sent events: ``data: {"token", "text"}`` for every token, whose text may be empty while a
character is not whole; the last has the fields of a generation. A failure after the first ends with
``data: {"error"}``. A prompt that leaves no room for max_new_tokens is refused, never cut.
"""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pst.errors import ConfigError
from serve.continuation import Continuation
from serve.generate import Generator
from serve.http.app import parse_object, parse_strings
from serve.http.errors import FAILED, RequestError
from serve.http.scheduler import Answer, Scheduler
from serve.http.service import ModelService
from serve.sampling import Sampling

FIELDS = ("text", "prompt", "max_new_tokens", "stop", "temperature", "top_p", "seed", "stream")
MAX_NEW_TOKENS = 64
MAX_STOPS = 16
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request, as it was parsed."""

    texts: list[str]
    max_new_tokens: int | None
    """None where the request leaves it open."""
    stop: list[str]
    sampling: Sampling
    stream: bool


class GenerateService(ModelService[Generator, Scheduler]):
    """Answers through a scheduler."""

    path = "/v1/generate"

    def warm_up(self, model: Generator) -> None:
        """A prompt and a token after it."""
        model.generate([[0]], max_new_tokens=min(2, model.max_length - 1))

    def make_worker(self, model: Generator, thread: ThreadPoolExecutor) -> Scheduler:
        """Texts of all requests grow together."""
        return Scheduler(model.decoding, self.options, thread=thread)

    def parse(self, body: bytes) -> Question:
        """See parse_question."""
        return parse_question(body, max_texts=self.options.max_queue_size)

    def parameters(self, model: Generator) -> dict[str, Any]:
        """Tokens that end an answer."""
        return {"eos_token_ids": model.eos_ids}

    async def respond(self, question: Question, request: Request) -> Response:
        """JSON or an event stream. Who goes away stops what was begun for them."""
        begun = await asyncio.to_thread(self._begin, question)
        answers = self.worker.submit(begun)
        if question.stream:
            # The task runs where the client went away while the stream was waiting to send, not for a token.
            done = BackgroundTask(answers[0].cancel)
            return StreamingResponse(_events(answers[0]), media_type="text/event-stream", background=done)
        try:
            generations = await _unless_gone(request, _all(answers))
        finally:
            for answer in answers:
                answer.cancel()
        return JSONResponse({"model": self.name, "generations": generations})

    def _begin(self, question: Question) -> list[Continuation]:
        model, most = self.model, question.max_new_tokens
        return [
            model.begin(
                prompt,
                max_new_tokens=max(1, min(MAX_NEW_TOKENS, model.max_length - len(prompt))) if most is None else most,
                stop=question.stop,
                sampling=question.sampling,
            )
            for prompt in model.tokenize(question.texts)
        ]


def parse_question(body: bytes, *, max_texts: int) -> Question:
    """The question in a request's JSON; raises RequestError that says what is wrong with it."""
    request = parse_object(body, fields=FIELDS)
    named = [name for name in ("text", "prompt") if name in request]
    if len(named) != 1:
        wrong = "is missing" if not named else "and prompt are the same; give one of them"
        raise RequestError(f'The field text {wrong}; send {{"text": "..."}}.')
    texts = parse_strings(request[named[0]], named[0], most=max_texts, blank=True)
    stop = parse_strings(request["stop"], "stop", most=MAX_STOPS, blank=True) if request.get("stop") else []
    stream = request.get("stream", False)
    if not isinstance(stream, bool):
        raise RequestError("The field stream must be true or false.")
    if stream and not isinstance(request[named[0]], str):
        raise RequestError("A stream answers one text; send a string, or a list without stream.")
    try:
        sampling = Sampling(
            temperature=_number(request, "temperature", 0.0),
            top_p=_number(request, "top_p", 1.0),
            seed=_whole(request, "seed"),
        )
    except ConfigError as error:
        raise RequestError(str(error)) from error
    most = _whole(request, "max_new_tokens")
    if most is not None and most < 1:
        raise RequestError(f"max_new_tokens is {most}; it must be at least 1.")
    return Question(texts=texts, max_new_tokens=most, stop=stop, sampling=sampling, stream=stream)


def _number(request: dict[str, Any], field: str, default: float) -> float:
    value = request.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"The field {field} must be a number.")
    return float(value)


def _whole(request: dict[str, Any], field: str) -> int | None:
    value = request.get(field)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise RequestError(f"The field {field} must be a whole number.")
    return value


def _generation(continuation: Continuation) -> dict[str, Any]:
    return {
        "text": continuation.text,
        "prompt_tokens": len(continuation.prompt),
        "new_tokens": len(continuation.tokens),
        "finish_reason": continuation.finish,
    }


async def _all(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    for answer in answers:
        async for _ in answer:
            pass
    return [_generation(answer.continuation) for answer in answers]


async def _events(answer: Answer) -> AsyncIterator[str]:
    try:
        async for piece in answer:
            yield _event({"token": piece.token, "text": piece.text})
        yield _event(_generation(answer.continuation))
    except Exception:
        yield _event({"error": FAILED})  # the status has been sent already
        raise
    finally:
        answer.cancel()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What *work* gives. Raises ClientDisconnect, and cancels it, as soon as the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
