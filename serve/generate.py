"""Texts continued by a causal language model's artifact: greedy decoding with the key/value cache, in numpy alone.

    with Generator(Path("artifact"), threads=2) as model:
        (answer,) = model.complete(["name : Blue Spice | area : riverside"], max_new_tokens=40)

Each step feeds the tokens that are new and the cache of all before (export/cache.py has the inputs and outputs). The
answer is the one that transformers' ``model.generate(do_sample=False, num_beams=1)`` gives, token for token, unless
the two highest scores lie closer together than the runtimes' rounding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from export import manifest
from pst.errors import ArtifactError, ConfigError, DataError, ModelError
from pst.files import read_json
from serve.engines import Array, TensorSpec, open_engine
from serve.text import TextEncoder

PAST, PRESENT = "past_key_values.", "present."
_REMEDY = "export the model again."


class Generator:
    """A language model that is ready to answer; close it, or use it in a ``with`` block.

    *engine* and *threads* are those of serve.engines.open_engine; *verify* compares the files with their SHA-256.
    Raises ArtifactError, ModelError or EngineError where the folder or the runtime is not usable.
    """

    def __init__(self, path: Path, *, engine: str = "auto", threads: int = 0, verify: bool = False) -> None:
        made = manifest.load(path, verify=verify)
        if made.task != "text_generation":
            raise ModelError(f"{path} was exported for {made.task}; give the artifact of a causal language model.")
        self.max_length = made.max_length
        """Tokens that a prompt and its answer may have together."""
        self.eos_ids = _eos_ids(path)
        """Tokens that end an answer; a text has one of them at most, as its last."""
        self.encoder = TextEncoder(path, max_length=made.max_length)
        self._pad_id = made.pad_token_id
        self.engine = open_engine(path, engine=engine, threads=threads)
        self._past = {name: spec for name, spec in self.engine.inputs.items() if name.startswith(PAST)}
        if not self._past or "position_ids" not in self.engine.inputs:
            self.engine.close()
            raise ArtifactError(f"{path} holds a graph without a key/value cache; {_REMEDY}")

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """The tokens that follow each of *prompts* (token ids), up to and with an end-of-text token, decoded together.

        Raises ConfigError for *max_new_tokens* below 1, DataError for an empty prompt or one that leaves no room.
        """
        self._check(prompts, max_new_tokens)
        if not prompts:
            return []
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, longest - len(prompt) :], mask[place, longest - len(prompt) :] = prompt, 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        past = {name: _empty(spec, len(prompts)) for name, spec in self._past.items()}
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = np.arange(len(prompts))  # (rows,) the answers that have not ended
        for step in range(max_new_tokens):
            feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            outputs = self.engine.infer(feeds | past)
            chosen = outputs["logits"][:, -1].argmax(axis=-1)  # (rows,)
            for row, token in zip(open_rows, chosen, strict=True):
                answers[row].append(int(token))
            going = ~np.isin(chosen, self.eos_ids)
            if step + 1 == max_new_tokens or not going.any():
                break
            past = {name: _rows(outputs[name.replace(PAST, PRESENT, 1)], going) for name in past}
            ids, open_rows = chosen[going, None].astype(np.int64), open_rows[going]
            positions = positions[going, -1:] + 1
            mask = np.concatenate([mask[going], np.ones_like(ids)], axis=1)
        return answers

    def complete(self, texts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """The text that follows each of *texts*, without special tokens; see generate."""
        prompts = [row.ids.tolist() for row in self.encoder.tokenize(texts)] if texts else []
        return self.encoder.decode(self.generate(prompts, max_new_tokens=max_new_tokens))

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        for index, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.max_length - max_new_tokens:
                raise DataError(
                    f"Prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones it must have 1 to "
                    f"{self.max_length - max_new_tokens}, since the model takes {self.max_length} in all."
                )

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _eos_ids(folder: Path) -> list[int]:
    """What transformers stops at: generation_config.json's eos_token_id, one or several, else config.json's."""
    found: Any = None
    for name in ("generation_config.json", "config.json"):
        if found is None and (folder / name).is_file():
            settings: Mapping[str, Any] = read_json(folder / name, ModelError, _REMEDY)
            found = settings.get("eos_token_id")
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]


def _empty(spec: TensorSpec, batch_size: int) -> Array:
    """A cache of no tokens: (batch_size, heads, 0, width)."""
    sizes = [size for size in spec.shape if isinstance(size, int)]
    if len(spec.shape) != 4 or len(sizes) != 2:
        raise ArtifactError(f"Input {spec.name} has the shape {spec.shape}, which no key/value cache has; {_REMEDY}")
    return np.zeros((batch_size, sizes[0], 0, sizes[1]), dtype=spec.dtype)


def _rows(cache: Array, going: Array) -> Array:
    """The rows that go on, without a copy where all do."""
    return cache if going.all() else cache[going]
