"""Text that is certain, and what ends it. Tokens are bytes of UTF-8 here; 0 ends a text."""

from collections.abc import Sequence

import numpy as np
import pytest

from serve.continuation import Continuation


def decode(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token).decode("utf-8", "replace")


def grown(text: str, *, stop: Sequence[str] = (), most: int = 100) -> tuple[Continuation, list[str]]:
    answer = Continuation([1], max_new_tokens=most, eos_ids=[0], decode=decode, stop=stop)
    pieces = []
    for byte in (*text.encode(), 0):
        scores = np.zeros(256, np.float32)
        scores[byte] = 1
        pieces.append(answer.take(scores))
        assert answer.text == "".join(pieces)
        if answer.finish:
            break
    return answer, pieces


def test_a_character_comes_when_it_is_whole() -> None:
    answer, pieces = grown("aé😀b")
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]
    assert (answer.text, answer.finish, len(answer.tokens)) == ("aé😀b", "stop", 9)


def test_what_is_never_whole_comes_at_the_end() -> None:
    answer, pieces = grown("a😀", most=3)
    assert (pieces, answer.finish) == (["a", "", "\N{REPLACEMENT CHARACTER}"], "length")


@pytest.mark.parametrize(
    ("text", "stop", "expected", "tokens"),
    [
        ("one two three", ["two"], "one ", 7),
        ("one two three", ["three", "o t"], "one tw", 9),
        ("one twt two", ["two"], "one twt ", 11),
        ("aaab", ["aab"], "a", 4),
        ("one", ["xyz", "ne!"], "one", 4),
        ("né😀x", ["é😀"], "n", 7),
        ("x", ["x"], "", 1),
    ],
)
def test_stop_texts(text: str, stop: list[str], expected: str, tokens: int) -> None:
    answer, _ = grown(text, stop=stop)
    assert (answer.text, answer.finish, len(answer.tokens)) == (expected, "stop", tokens)


def test_nothing_of_a_stop_text_is_sent() -> None:
    _, pieces = grown("a stone, a stop!", stop=["stop!"])
    assert pieces == ["a", " ", "", "", "", "ston", "e", ",", " ", "a", " ", "", "", "", "", ""]


def test_the_end_comes_with_what_was_held_back() -> None:
    answer, pieces = grown("to", stop=["top"])
    assert (pieces, answer.text) == (["", "", "to"], "to")
