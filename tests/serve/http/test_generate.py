"""/v1/generate in one process: what may be asked, what is answered, and who goes away."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.continuation import Continuation
from serve.decoding import Decoding
from serve.engines import Array
from serve.generate import Generator
from serve.http.app import create_app
from serve.http.batcher import BatchOptions
from serve.http.generate import GenerateService

Scenario = Callable[[httpx.AsyncClient, GenerateService], Awaitable[None]]
PROMPT = "the film is a lovely story of love and war"


@pytest.fixture(scope="module")
def artifact(exported: Callable[[str], tuple[Path, Path]]) -> Path:
    return exported("gpt2")[1]


@contextlib.asynccontextmanager
async def served(artifact: Path, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, GenerateService]]:
    service = GenerateService("tiny", lambda: Generator(artifact, threads=1), BatchOptions(**options))
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await service.start()
        try:
            yield client, service
        finally:
            await service.close()


def with_client(artifact: Path, scenario: Scenario, **options: Any) -> None:
    async def main() -> None:
        async with served(artifact, **options) as (client, service):
            await scenario(client, service)

    asyncio.run(main())


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_one_and_many(artifact: Path) -> None:
    with Generator(artifact, threads=1) as model:
        expected = model.complete([PROMPT, "dull"], max_new_tokens=12)
        counts = [len(prompt) for prompt in model.tokenize([PROMPT, "dull"])]

    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        one = (await client.post("/v1/generate", json={"text": PROMPT, "max_new_tokens": 12})).json()
        assert one["model"] == "tiny"
        assert one["generations"][0]["text"] == expected[0]
        many = (await client.post("/v1/generate", json={"prompt": [PROMPT, "dull"], "max_new_tokens": 12})).json()
        assert [each["text"] for each in many["generations"]] == expected
        assert [each["prompt_tokens"] for each in many["generations"]] == counts
        for each in many["generations"]:
            assert each["finish_reason"] == ("length" if each["new_tokens"] == 12 else "stop")

    with_client(artifact, scenario)


def test_a_stream_is_the_same_answer_piece_by_piece(artifact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        body = {"text": PROMPT, "max_new_tokens": 12}
        (whole,) = (await client.post("/v1/generate", json=body)).json()["generations"]
        *pieces, last = events(await client.post("/v1/generate", json=body | {"stream": True}))
        assert last == whole
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        assert len(pieces) == whole["new_tokens"]
        assert [piece["token"] for piece in pieces] == service.model.generate(
            service.model.tokenize([PROMPT]), max_new_tokens=12
        )[0]

    with_client(artifact, scenario)


def test_stop_and_sampling(artifact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        async def ask(**options: Any) -> dict[str, Any]:
            answer = await client.post("/v1/generate", json={"text": PROMPT, "max_new_tokens": 20, **options})
            generation: dict[str, Any] = answer.json()["generations"][0]
            return generation

        plain = await ask()
        words = plain["text"].split(" ")
        stopped = await ask(stop=words[3])
        assert stopped["text"] == plain["text"][: plain["text"].index(words[3])]
        assert stopped["finish_reason"] == "stop"
        assert stopped["new_tokens"] <= 4
        assert await ask(stop=["\n", words[3]]) == stopped
        drawn = await ask(temperature=1.5, top_p=0.95, seed=3)
        assert drawn == await ask(temperature=1.5, top_p=0.95, seed=3)
        others = [await ask(temperature=1.5, top_p=0.95, seed=seed) for seed in range(4, 9)]
        assert any(other["text"] != drawn["text"] for other in others)
        assert await ask(temperature=0, top_p=0.5, seed=None) == plain

    with_client(artifact, scenario)


def test_what_is_left_open_fits(artifact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        service.model.eos_ids.clear()
        long = " ".join(["film"] * 58)  # 60 tokens with the tokenizer's own two
        (one,) = (await client.post("/v1/generate", json={"text": long})).json()["generations"]
        assert (one["prompt_tokens"], one["new_tokens"], one["finish_reason"]) == (60, 4, "length")
        for words, tokens in ((62, 64), (400, 402)):
            answer = await client.post("/v1/generate", json={"text": " ".join(["film"] * words)})
            assert answer.status_code == 400
            assert answer.json()["error"].startswith(f"The prompt has {tokens} tokens; with 1 new ones")
        answer = await client.post("/v1/generate", json={"text": long, "max_new_tokens": 5, "stream": True})
        assert answer.status_code == 400
        assert "it must have 1 to 59, since the model takes 64 in all" in answer.json()["error"]
        for count in (64, 1000):
            answer = await client.post("/v1/generate", json={"text": "film", "max_new_tokens": count})
            assert answer.status_code == 400
            assert answer.json()["error"].startswith(f"max_new_tokens is {count}; give 63 at most")

    with_client(artifact, scenario)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "text is missing"),
        ({"text": "a", "prompt": "a"}, "give one of them"),
        ({"text": 3}, "string or a list of strings"),
        ({"text": ""}, "empty text"),
        ({"text": []}, "empty list"),
        ({"text": ["a"] * 5}, "5 texts are too many"),
        ({"text": "a", "max_tokens": 3}, "'max_tokens' is unknown"),
        ({"text": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"text": "a", "max_new_tokens": 1.5}, "max_new_tokens must be a whole number"),
        ({"text": "a", "max_new_tokens": True}, "max_new_tokens must be a whole number"),
        ({"text": "a", "max_new_tokens": 10**30}, "the model takes 64"),
        ({"text": "a", "stop": ["b", ""]}, "stop holds an empty text"),
        ({"text": "a", "stop": 3}, "stop must be a string"),
        ({"text": "a", "stop": ["b"] * 17}, "17 texts are too many"),
        ({"text": "a", "temperature": -1}, "temperature is -1"),
        ({"text": "a", "temperature": "hot"}, "temperature must be a number"),
        ({"text": "a", "top_p": 0}, "top_p is 0"),
        ({"text": "a", "seed": 1.0}, "seed must be a whole number"),
        ({"text": "a", "seed": -1}, "seed is -1"),
        ({"text": "a", "stream": 1}, "stream must be true or false"),
        ({"text": ["a", "b"], "stream": True}, "A stream answers one text"),
    ],
)
def test_bad_requests(artifact: Path, body: dict[str, Any], message: str) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        answer = await client.post("/v1/generate", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]

    with_client(artifact, scenario, max_queue_size=4, max_batch_size=4)


def test_paths(artifact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        assert (await client.get("/v2/health/ready")).status_code == 200
        assert (await client.post("/v1/classify", json={"text": "a"})).status_code == 404
        metadata = (await client.get("/v2/models/tiny")).json()
        assert metadata["parameters"]["task"] == "text_generation"
        assert metadata["parameters"]["eos_token_ids"] == [3]
        assert metadata["parameters"]["pattern"] == "2:4"
        assert {"name": "past_key_values.0.key", "datatype": "FP32", "shape": [-1, 2, -1, 16]} in metadata["inputs"]

    with_client(artifact, scenario)


class Held(Decoding):
    """Stops before each step until it may go on."""

    gate = threading.Event()

    def step(self, tokens: Array) -> Array:
        assert self.gate.wait(30)
        return super().step(tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_text(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """Through the bare interface of a server: httpx cannot hang up in the middle."""
    begun: list[Continuation] = []
    begin, gone = Generator.begin, asyncio.Event()

    def recorded(self: Generator, *arguments: Any, **options: Any) -> Continuation:
        begun.append(begin(self, *arguments, **options))
        return begun[-1]

    monkeypatch.setattr(Generator, "begin", recorded)
    monkeypatch.setattr(Held, "gate", threading.Event())

    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        service.model.eos_ids.clear()
        body = json.dumps({"text": "film", "max_new_tokens": 50, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/generate", "headers": [], "query_string": b""}
        asking = asyncio.create_task(create_app(service)(scope, receive, send))
        while not begun or not begun[0].tokens:
            await asyncio.sleep(0.001)
        gone.set()
        await asking
        Held.gate.set()
        answer = await client.post("/v1/generate", json={"text": "a", "max_new_tokens": 30})
        assert answer.json()["generations"][0]["new_tokens"] == 30
        assert len(begun[0].tokens) <= 2  # the prompt's, and that of the step which was held

    monkeypatch.setattr("serve.generate.Decoding", Held)
    Held.gate.set()
    held: list[None] = []

    async def main() -> None:
        async with served(artifact) as (client, service):
            Held.gate.clear()
            held.append(None)
            await scenario(client, service)

    asyncio.run(main())
    assert held


def test_failures(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        body = {"text": "film", "max_new_tokens": 5}
        with monkeypatch.context() as patched:
            patched.setattr(Decoding, "step", lambda self, tokens: 1 // 0)
            answer = await client.post("/v1/generate", json=body)
            assert (answer.status_code, "failed to answer" in answer.json()["error"]) == (500, True)
            first, last = events(await client.post("/v1/generate", json=body | {"stream": True}))
            assert set(first) == {"token", "text"}
            assert "failed to answer" in last["error"]
        assert (await client.post("/v1/generate", json=body)).status_code == 200

    with_client(artifact, scenario)


def test_full_queue(artifact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: GenerateService) -> None:
        service.worker._max_queue_size = 0
        for stream in (False, True):
            answer = await client.post("/v1/generate", json={"text": "film", "stream": stream})
            assert answer.status_code == 503
            assert "queue is full" in answer.json()["error"]
            assert answer.headers["retry-after"] == "1"

    with_client(artifact, scenario)
