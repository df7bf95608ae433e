"""One prompt and its answer as it grows, token by token: what ends it, and which of its text is certain already."""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from serve.engines import Array
from serve.sampling import Picker, Sampling

Finish = Literal["stop", "length"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""How a decoder writes bytes that are no whole character yet."""


class Continuation:
    """An answer. *decode* gives the text of token ids, special tokens left out; *stop* texts end it and are cut off."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        eos_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        """Those of the answer, with the end-of-text token where there was one."""
        self.text = ""
        """Of the answer, as far as no further token changes it."""
        self.finish: Finish | None = None
        """``stop``: an end-of-text token or a stop text came. ``length``: max_new_tokens are there."""
        self._max_new_tokens, self._eos_ids, self._decode, self._stop = max_new_tokens, eos_ids, decode, stop
        self._picker = Picker(sampling or Sampling())

    def take(self, logits: Array) -> str:
        """Choose the next token from its scores, (vocabulary,); the text that has become certain by it."""
        self.tokens.append(self._picker.pick(logits))
        if self.tokens[-1] in self._eos_ids:
            self.finish = "stop"
        elif len(self.tokens) == self._max_new_tokens:
            self.finish = "length"
        sent, text = len(self.text), self._decode(self.tokens)
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.finish, text = "stop", text[: min(found)]
        elif self.finish is None:
            text = text[: len(text) - self._uncertain(text)]
        if len(text) > sent or self.finish is not None:
            self.text = text
        return self.text[sent:]

    def _uncertain(self, text: str) -> int:
        """How many characters at the end may still become another one, or a part of a stop text."""
        whole = text.rstrip(REPLACEMENT)
        longest = max(
            (size for stop in self._stop for size in range(1, len(stop)) if whole.endswith(stop[:size])), default=0
        )
        return len(text) - len(whole) + longest
