"""A classifier or regressor behind HTTP.

    POST /v1/classify   {"text": "..."} or {"text": ["...", ...]}; for pairs "text_pair" in the same form
                        -> {"model": name, "predictions": [{"label", "score", "scores"} or {"value"}, ...]}

A text longer than the model's max_length is cut, as in training. An empty text is refused: its answer would mean
nothing.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.classify import Classifier, Prediction
from serve.http.app import parse_object, parse_strings
from serve.http.batcher import Batcher
from serve.http.errors import RequestError
from serve.http.service import ModelService

FIELDS = ("text", "text_pair")
TextPair = tuple[str, str | None]


class ClassifyService(ModelService[Classifier, Batcher[TextPair, Prediction]]):
    """Answers through a batcher."""

    path = "/v1/classify"

    def warm_up(self, model: Classifier) -> None:
        """See Classifier.warm_up."""
        model.warm_up()

    def make_worker(self, model: Classifier, thread: ThreadPoolExecutor) -> Batcher[TextPair, Prediction]:
        """Requests that come together share an inference."""
        return Batcher(lambda texts: run_batch(model, texts), self.options, thread=thread)

    def parse(self, body: bytes) -> list[TextPair]:
        """See parse_texts."""
        return parse_texts(body, max_texts=self.options.max_queue_size)

    async def respond(self, question: list[TextPair], request: Request) -> Response:
        """One prediction per text or pair."""
        predictions = await self.worker.submit(question)
        return JSONResponse({"model": self.name, "predictions": [answer.to_json() for answer in predictions]})

    def parameters(self, model: Classifier) -> dict[str, Any]:
        """Labels by their number."""
        return {"labels": list(model.folder.labels)}


def parse_texts(body: bytes, *, max_texts: int) -> list[TextPair]:
    """The texts, or pairs, of a request's JSON; raises RequestError that says what is wrong with it."""
    request = parse_object(body, fields=FIELDS)
    if "text" not in request:
        raise RequestError('The field text is missing; send {"text": "..."}.')
    first = parse_strings(request["text"], "text", most=max_texts)
    if "text_pair" not in request:
        return [(text, None) for text in first]
    second = parse_strings(request["text_pair"], "text_pair", most=max_texts)
    if len(second) != len(first) or isinstance(request["text"], str) != isinstance(request["text_pair"], str):
        raise RequestError("text and text_pair must have the same form: two strings, or two lists of the same length.")
    return list(zip(first, second, strict=True))


def run_batch(classifier: Classifier, texts: list[TextPair]) -> list[Prediction]:
    """Single texts and pairs may meet in one batch, but not in one inference: each kind has its own."""
    results: list[Prediction | None] = [None] * len(texts)
    single = [index for index, (_, second) in enumerate(texts) if second is None]
    paired = [index for index, (_, second) in enumerate(texts) if second is not None]
    for indices in (single, paired):
        first = [texts[index][0] for index in indices]
        second = None if indices is single else [texts[index][1] or "" for index in indices]
        for index, prediction in zip(indices, classifier.predict(first, second), strict=True):
            results[index] = prediction
    return [prediction for prediction in results if prediction is not None]
