"""Language models behind the real server: a process of its own, and sockets."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pst.errors import EngineError
from serve.generate import Generator
from serve.http.client import ask, generate

from ...command_line import ready_url
from ...conftest import BAD, FILLER, GOOD
from ...decoders import KINDS

ROOT = Path(__file__).resolve().parents[3]
Exported = Callable[[str], tuple[Path, Path]]


@contextlib.contextmanager
def served(artifact: Path, *options: object) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """``pst serve`` itself, and its address."""
    command = [sys.executable, "-m", "cli", "serve", str(artifact), "--port", "0", "--threads", "1", *map(str, options)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        yield process, ready_url(process)
    finally:
        process.kill() if process.poll() is None else None
        process.communicate()


def texts(count: int) -> list[str]:
    random = np.random.default_rng(4)
    return [" ".join(random.choice([*GOOD, *BAD, *FILLER], int(random.integers(1, 25)))) for _ in range(count)]


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Events as they come."""
    request = urllib.request.Request(f"{url}/v1/generate", json.dumps(body | {"stream": True}).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            if line.strip():
                yield json.loads(line.removeprefix(b"data: "))


@pytest.mark.parametrize("kind", KINDS)
def test_many_at_once_get_the_generators_tokens(exported: Exported, kind: str) -> None:
    _, artifact = exported(kind)
    prompts = texts(24)
    with Generator(artifact, threads=1) as model:
        tokens = [model.generate([prompt], max_new_tokens=20)[0] for prompt in model.tokenize(prompts)]
        expected = model.encoder.decode(tokens)
    with served(artifact, "--max-batch-size", 5) as (process, url), ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda text: generate(url, text, max_new_tokens=20)["generations"][0], prompts))
        assert [answer["text"] for answer in answers] == expected
        assert [answer["new_tokens"] for answer in answers] == [len(row) for row in tokens]
        streamed = list(pool.map(lambda text: list(stream(url, {"text": text, "max_new_tokens": 20})), prompts))
        assert [[event["token"] for event in events[:-1]] for events in streamed] == tokens
        assert [events[-1]["text"] for events in streamed] == expected
        with pytest.raises(EngineError, match=r"answered 400: The prompt has 102 tokens; with 1 new ones"):
            generate(url, " ".join(["film"] * 100))
        with pytest.raises(EngineError, match="answered 404"):
            ask(url, "film")
        process.terminate()
        assert process.wait(60) == 0


def test_a_text_that_runs_is_finished_before_the_stop(exported: Exported) -> None:
    _, artifact = exported("gpt2")
    prompts = texts(24)
    with Generator(artifact, threads=1) as model:
        tokens = [model.generate([prompt], max_new_tokens=30)[0] for prompt in model.tokenize(prompts)]
    longest = max(range(len(prompts)), key=lambda index: len(tokens[index]))
    assert len(tokens[longest]) == 30
    with served(artifact) as (process, url):
        events = stream(url, {"prompt": prompts[longest], "max_new_tokens": 30})
        first = next(events)
        process.send_signal(signal.SIGTERM)
        *rest, last = events
        assert [event["token"] for event in (first, *rest)] == tokens[longest]
        assert last["finish_reason"] == "length"
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_who_hangs_up_leaves_a_server_that_answers(exported: Exported) -> None:
    _, artifact = exported("gpt2")
    with served(artifact, "--max-batch-size", 1) as (process, url):
        for text in texts(10):
            events = stream(url, {"text": text, "max_new_tokens": 30})
            next(events)
            events.close()  # type: ignore[attr-defined]
        assert generate(url, "film", max_new_tokens=3)["generations"][0]["new_tokens"] <= 3
        process.terminate()
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
