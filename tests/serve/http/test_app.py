"""The transport with a real model behind it, in one process."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from pst.errors import ConfigError
from serve.classify import Classifier
from serve.engines import Array
from serve.http.app import MAX_BODY_BYTES, create_app
from serve.http.batcher import BatchOptions, QueueFullError
from serve.http.classify import ClassifyService
from serve.http.worker import ClosedError
from serve.text import Tokens

Body = dict[str, Any]


@contextlib.asynccontextmanager
async def client_of(artifact: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    service = ClassifyService("tiny", lambda: Classifier(artifact, threads=1), BatchOptions(**options))
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await service.start()
        try:
            yield client
        finally:
            await service.close()


def with_client(artifact: Path, scenario: Callable[[httpx.AsyncClient], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with client_of(artifact, **options) as client:
            await scenario(client)

    asyncio.run(main())


def test_classify_one_and_many(bert_artifact: Path) -> None:
    with Classifier(bert_artifact) as classifier:
        expected = [classifier.predict([text])[0] for text in ("lovely film", "a dull story of war")]

    async def scenario(client: httpx.AsyncClient) -> None:
        one = (await client.post("/v1/classify", json={"text": "lovely film"})).json()
        assert one["model"] == "tiny"
        assert set(one["predictions"][0]) == {"label", "score", "scores"}
        many = (await client.post("/v1/classify", json={"text": ["lovely film", "a dull story of war"]})).json()
        assert len(many["predictions"]) == 2
        for answer, reference in zip(
            [*one["predictions"], *many["predictions"]], [expected[0], *expected], strict=True
        ):
            assert answer["label"] == reference.label
            assert answer["scores"] == pytest.approx(reference.scores, abs=1e-5)
            assert answer["score"] == max(answer["scores"].values())
            assert sum(answer["scores"].values()) == pytest.approx(1.0, abs=1e-12)

    with_client(bert_artifact, scenario)


def test_one_thread_loads_and_infers(bert_artifact: Path) -> None:
    threads: list[int] = []

    class Watched(Classifier):
        def __init__(self) -> None:
            threads.append(threading.get_ident())
            super().__init__(bert_artifact, threads=1)

        def logits(self, rows: Sequence[Tokens]) -> Array:
            threads.append(threading.get_ident())
            return super().logits(rows)

    async def main() -> None:
        service = ClassifyService("tiny", Watched, BatchOptions())
        await service.start()
        await service.worker.submit([("lovely film", None)])
        await service.close()

    asyncio.run(main())
    assert len(threads) == 3
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


def test_pairs(bert_artifact: Path) -> None:
    with Classifier(bert_artifact) as classifier:
        expected = classifier.predict(["the film"], ["a lovely story"])[0]

    async def scenario(client: httpx.AsyncClient) -> None:
        single = {"text": "the film"}
        pair = {"text": "the film", "text_pair": "a lovely story"}
        answers = await asyncio.gather(*(client.post("/v1/classify", json=body) for body in (single, pair, single)))
        scores = [answer.json()["predictions"][0]["scores"] for answer in answers]
        assert scores[1] == pytest.approx(expected.scores, abs=1e-5)
        assert scores[0] == pytest.approx(scores[2], abs=1e-5)
        lists = {"text": ["the film"], "text_pair": ["a lovely story"]}
        listed = (await client.post("/v1/classify", json=lists)).json()
        assert listed["predictions"][0]["scores"] == pytest.approx(expected.scores, abs=1e-5)

    with_client(bert_artifact, scenario)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'"text"', 400, "JSON object"),
        (b"{}", 400, "text is missing"),
        (b'{"text": 3}', 400, "string or a list of strings"),
        (b'{"text": null}', 400, "string or a list of strings"),
        (b'{"text": ["a", 3]}', 400, "string or a list of strings"),
        (b'{"text": {"a": "b"}}', 400, "string or a list of strings"),
        (b'{"text": ""}', 400, "empty text"),
        (b'{"text": ["fine", " \\n"]}', 400, "empty text"),
        (b'{"text": []}', 400, "empty list"),
        (b'{"text": "half \\ud83d"}', 400, "surrogate"),
        (b'{"text": "a", "txet": "b"}', 400, "'txet' is unknown"),
        (b'{"text": "a", "text_pair": ["b"]}', 400, "same form"),
        (b'{"text": ["a", "b"], "text_pair": ["b"]}', 400, "same length"),
        (json.dumps({"text": ["a"] * 33}).encode(), 400, "33 texts are too many"),
        (json.dumps({"text": "a" * MAX_BODY_BYTES}).encode(), 413, "longer than"),
    ],
)
def test_bad_requests(bert_artifact: Path, body: bytes, status: int, message: str) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/classify", content=body)
        assert answer.status_code == status
        assert message in answer.json()["error"]
        assert (await client.post("/v1/classify", json={"text": "still answers"})).status_code == 200

    with_client(bert_artifact, scenario, max_queue_size=32)


def test_paths(bert_artifact: Path) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready"):
            assert (await client.get(path)).status_code == 200
        for path, status in (("/nowhere", 404), ("/v2/models/other", 404), ("/v1/classify", 405)):
            answer = await client.get(path)
            assert answer.status_code == status
            assert answer.json()["error"]
        metadata = (await client.get("/v2/models/tiny")).json()
        assert metadata["platform"] == "onnxruntime_onnx"
        assert {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]} in metadata["inputs"]
        (logits,) = metadata["outputs"]
        assert (logits["name"], logits["datatype"], logits["shape"][0]) == ("logits", "FP32", -1)
        assert metadata["parameters"]["labels"] == ["NEGATIVE", "POSITIVE"]
        assert metadata["parameters"]["max_length"] == 64

    with_client(bert_artifact, scenario)


class Stub:
    """A service that is not ready, or fails in a given way."""

    name = "stub"
    path = "/v1/classify"

    def __init__(self, *, ready: bool = True, error: Exception | None = None) -> None:
        self.ready = ready
        self.error = error

    def metadata(self) -> dict[str, Any]:
        return {}

    def parse(self, body: bytes) -> bytes:
        return body

    async def respond(self, question: bytes, request: Request) -> Response:
        assert self.error is not None
        raise self.error


def answer_of(stub: Stub, method: str, path: str) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(stub), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, json={"text": "a"} if method == "POST" else None)

    return asyncio.run(main())


def test_not_ready() -> None:
    stub = Stub(ready=False)
    assert answer_of(stub, "GET", "/v2/health/live").status_code == 200
    for method, path in (("GET", "/v2/health/ready"), ("GET", "/v2/models/stub"), ("POST", "/v1/classify")):
        answer = answer_of(stub, method, path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "not ready" in answer.json()["error"]


@pytest.mark.parametrize(
    ("error", "status", "retry_after", "message"),
    [
        (QueueFullError(2.3), 503, "3", "queue is full"),
        (QueueFullError(0.0), 503, "1", "queue is full"),
        (ClosedError(), 503, "1", "stopping"),
        (ZeroDivisionError("secret"), 500, None, "failed to answer"),
    ],
)
def test_failures(error: Exception, status: int, retry_after: str | None, message: str) -> None:
    answer = answer_of(Stub(error=error), "POST", "/v1/classify")
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert message in answer.json()["error"]
    assert "secret" not in answer.text


def test_batch_options() -> None:
    for wrong in ({"max_batch_size": 0}, {"max_queue_size": 3}, {"max_queue_delay_ms": -1.0}):
        with pytest.raises(ConfigError, match="must"):
            BatchOptions(**{"max_batch_size": 4, **wrong})  # type: ignore[arg-type]
