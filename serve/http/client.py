"""Asking a running server, with the standard library alone."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from pst.errors import EngineError

TIMEOUT_S = 60.0


def ask(
    url: str, text: str | Sequence[str], *, text_pair: str | Sequence[str] | None = None, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """POST *text* (one or several) to ``{url}/v1/classify``; the answer's JSON, with a list under ``predictions``.

    Raises EngineError with the server's own words where it refuses, or where nothing answers at *url*.
    """
    question: dict[str, Any] = {"text": text if isinstance(text, str) else list(text)}
    if text_pair is not None:
        question["text_pair"] = text_pair if isinstance(text_pair, str) else list(text_pair)
    return _post(f"{url.rstrip('/')}/v1/classify", question, timeout_s=timeout_s)


def generate(url: str, text: str | Sequence[str], *, timeout_s: float = TIMEOUT_S, **options: Any) -> dict[str, Any]:
    """POST *text* (one or several) to ``{url}/v1/generate``; the answer's JSON, with a list under ``generations``.

    *options* are the request's other fields (serve/http/generate.py), stream excepted. Raises EngineError, see ask.
    """
    question = {"text": text if isinstance(text, str) else list(text), **options}
    return _post(f"{url.rstrip('/')}/v1/generate", question, timeout_s=timeout_s)


def _post(address: str, question: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
    request = urllib.request.Request(
        address, data=json.dumps(question).encode(), headers={"Content-Type": "application/json"}
    )
    # The server is named by its address: a proxy of the environment must not stand between.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = address.rpartition("/v1/")[0]
    try:
        with opener.open(request, timeout=timeout_s) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        with error:
            raise EngineError(f"{url} answered {error.code}: {_message(error.read())}") from error
    except OSError as error:
        raise EngineError(f"Nothing answers at {url} ({error}); start a server with pst serve.") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")
