"""Texts continued by a causal language model's artifact: greedy decoding with the key/value cache, in numpy alone.

    with Generator(Path("artifact"), threads=2) as model:
        (answer,) = model.complete(["name : Blue Spice | area : riverside"], max_new_tokens=40)

Each step feeds the tokens that are new and the cache of all before (export/cache.py has the inputs and outputs). The
answer is the one that transformers' ``model.generate(do_sample=False, num_beams=1)`` gives, token for token, unless
the two highest scores lie closer together than the runtimes' rounding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export import manifest
from pst.errors import ArtifactError, ConfigError, DataError, ModelError
from pst.files import read_json
from serve.continuation import Continuation
from serve.decoding import REMEDY, Decoding, has_cache
from serve.describe import ModelFolder, describe
from serve.engines import ANY_SHAPE, Engine, Shapes
from serve.holder import EngineHolder
from serve.sampling import Sampling
from serve.text import TextEncoder


class Generator(EngineHolder):
    """A language model that is ready to answer; close it, or use it in a ``with`` block.

    *engine*, *threads* and *shapes* are those of serve.engines.open_engine, or *engine* is open already, and close
    leaves it alone; *verify* compares the files with their SHA-256.
    Raises ArtifactError, ModelError or EngineError where the folder or the runtime is not usable.
    """

    def __init__(
        self,
        path: Path,
        *,
        engine: str | Engine = "auto",
        threads: int = 0,
        shapes: Shapes = ANY_SHAPE,
        verify: bool = False,
    ) -> None:
        made = manifest.load(path, verify=verify)
        if made.task != "text_generation":
            raise ModelError(f"{path} was exported for {made.task}; give the artifact of a causal language model.")
        self.folder: ModelFolder = describe(path)
        self.max_length = made.max_length
        """Tokens that a prompt and its answer may have together."""
        self.eos_ids = _eos_ids(path)
        """Tokens that end an answer; a text has one of them at most, as its last."""
        self.encoder = TextEncoder(path, max_length=None)
        self._pad_id = made.pad_token_id
        super().__init__(path, engine=engine, threads=threads, shapes=shapes)
        if not has_cache(self.engine.inputs):
            self.close()
            raise ArtifactError(f"{path} holds a graph without a key/value cache; {REMEDY}")

    def decoding(self) -> Decoding:
        """A cache without rows."""
        return Decoding(self.engine, pad_id=self._pad_id)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """The tokens that follow each of *prompts* (token ids), up to and with an end-of-text token, decoded together.

        Raises ConfigError for *max_new_tokens* below 1, DataError for an empty prompt or one that leaves no room.
        """
        for index, prompt in enumerate(prompts):
            self.check(len(prompt), max_new_tokens, name=f"Prompt {index}")
        if not prompts:
            return []
        decoding, answers = self.decoding(), [list[int]() for _ in prompts]
        open_rows = np.arange(len(prompts))  # (rows,) the answers that have not ended
        logits = decoding.join(prompts)
        for step in range(max_new_tokens):
            chosen = logits.argmax(axis=-1)  # (rows,)
            for row, token in zip(open_rows, chosen, strict=True):
                answers[row].append(int(token))
            going = ~np.isin(chosen, self.eos_ids)
            if step + 1 == max_new_tokens or not going.any():
                break
            decoding.keep(going)
            open_rows = open_rows[going]
            logits = decoding.step(chosen[going])
        return answers

    def complete(self, texts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """The text that follows each of *texts*, without special tokens; see generate."""
        return self.encoder.decode(self.generate(self.tokenize(texts), max_new_tokens=max_new_tokens))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of prompts, however long. Raises DataError for a text without any."""
        return [row.ids.tolist() for row in self.encoder.tokenize(texts)] if texts else []

    def begin(
        self, prompt: Sequence[int], *, max_new_tokens: int, stop: Sequence[str] = (), sampling: Sampling | None = None
    ) -> Continuation:
        """The answer to *prompt*, of no tokens yet; whoever has a decoding of this model takes them. See generate."""
        self.check(len(prompt), max_new_tokens)
        return Continuation(
            prompt,
            max_new_tokens=max_new_tokens,
            eos_ids=self.eos_ids,
            decode=lambda tokens: self.encoder.decode([tokens])[0],
            stop=stop,
            sampling=sampling,
        )

    def check(self, length: int, max_new_tokens: int, *, name: str = "The prompt") -> None:
        """Raise ConfigError or DataError, naming the prompt, unless one of *length* tokens and its answer fit."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if max_new_tokens >= self.max_length:
            raise DataError(
                f"max_new_tokens is {max_new_tokens}; give {self.max_length - 1} at most, since the model takes "
                f"{self.max_length} in all, the prompt's among them."
            )
        if not 0 < length <= self.max_length - max_new_tokens:
            raise DataError(
                f"{name} has {length} tokens; with {max_new_tokens} new ones it must have 1 to "
                f"{self.max_length - max_new_tokens}, since the model takes {self.max_length} in all."
            )


def _eos_ids(folder: Path) -> list[int]:
    """What transformers stops at: generation_config.json's eos_token_id, one or several, else config.json's."""
    found: Any = None
    for name in ("generation_config.json", "config.json"):
        if found is None and (folder / name).is_file():
            settings: Mapping[str, Any] = read_json(folder / name, ModelError, REMEDY)
            found = settings.get("eos_token_id")
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]
