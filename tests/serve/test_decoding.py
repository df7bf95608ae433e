"""Rows that join and leave get the tokens that each gets alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pst.errors import ArtifactError
from serve.decoding import Decoding
from serve.engines import open_engine
from serve.generate import Generator

from ..decoders import KINDS

Exported = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("kind", KINDS)
def test_who_joins_and_leaves_changes_nothing_for_the_others(exported: Exported, kind: str) -> None:
    random = np.random.default_rng(5)
    prompts = [random.integers(4, 35, int(random.integers(1, 30))).tolist() for _ in range(24)]
    with Generator(exported(kind)[1], threads=1) as model:
        model.eos_ids = []  # so that each goes on for as long as this test wants
        lengths = [int(random.integers(1, 25)) for _ in prompts]
        alone = [
            model.generate([prompt], max_new_tokens=length)[0] for prompt, length in zip(prompts, lengths, strict=True)
        ]
        decoding, waiting = model.decoding(), list(range(len(prompts)))
        running: list[int] = []
        answers: dict[int, list[int]] = {index: [] for index in waiting}
        while waiting or running:
            going = np.array([len(answers[index]) < lengths[index] for index in running], dtype=bool)
            decoding.keep(going)
            running = [index for index, goes in zip(running, going, strict=True) if goes]
            if running:
                chosen = decoding.step(np.array([answers[index][-1] for index in running])).argmax(axis=-1)
                for index, token in zip(running, chosen.tolist(), strict=True):
                    answers[index].append(token)
            joining = waiting[: int(random.integers(0, 4))]
            waiting = waiting[len(joining) :]
            if joining:
                chosen = decoding.join([prompts[index] for index in joining]).argmax(axis=-1)
                for index, token in zip(joining, chosen.tolist(), strict=True):
                    answers[index].append(token)
                running += joining
            assert len(decoding) == len(running)
    assert [answers[index] for index in range(len(prompts))] == alone


def test_a_copy_goes_its_own_way(exported: Exported) -> None:
    with Generator(exported("gpt2")[1], threads=1) as model:
        decoding = model.decoding()
        decoding.join([[5, 6, 7], [8]])
        other = decoding.copy()
        first = decoding.step(np.array([9, 10]))
        decoding.step(np.array([11, 12]))
        np.testing.assert_array_equal(other.step(np.array([9, 10])), first)


def test_padding_goes_with_the_row_that_needed_it(exported: Exported) -> None:
    """Else a server's cache would stay as long as the longest text that it ever had."""
    with Generator(exported("gpt2")[1], threads=1) as model:
        decoding = model.decoding()
        decoding.join([list(range(4, 34)), [8]])
        decoding.keep(np.array([False, True]))
        assert decoding._cache is not None
        assert {cache.shape for cache in decoding._cache.arrays().values()} == {(1, 2, 1, 16)}
        decoding.keep(np.array([False]))
        assert len(decoding) == 0
        assert decoding.join([[5, 6]]).shape == (1, 35)


def test_a_graph_without_a_cache(bert_artifact: Path) -> None:
    with open_engine(bert_artifact, threads=1) as engine, pytest.raises(ArtifactError, match="no key/value cache"):
        Decoding(engine, pad_id=0)
