"""The scheduler with a real model, and with one that waits or fails where the test says."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from serve.continuation import Continuation
from serve.decoding import Decoding
from serve.engines import Array
from serve.generate import Generator
from serve.http.batcher import BatchOptions, QueueFullError
from serve.http.scheduler import Answer, Scheduler
from serve.http.worker import ClosedError

Scenario = Callable[[Scheduler], Awaitable[None]]


@pytest.fixture(scope="module")
def model(exported: Callable[[str], tuple[Path, Path]]) -> Iterator[Generator]:
    with Generator(exported("gpt2")[1], threads=1) as generator:
        yield generator


class Gated(Decoding):
    """Waits before each inference until the gate is open, and fails at the tokens that it does not like."""

    gate = threading.Event()
    entered = threading.Event()
    bad_prompt: Sequence[int] = ()
    bad_steps = False

    def join(self, prompts: Sequence[Sequence[int]]) -> Array:
        self.entered.set()
        assert self.gate.wait(30)
        if prompts[0] == self.bad_prompt:
            raise ValueError("bad prompt")
        return super().join(prompts)

    def step(self, tokens: Array) -> Array:
        assert self.gate.wait(30)
        if self.bad_steps:
            raise ValueError("bad step")
        return super().step(tokens)


def gated(model: Generator, *, is_open: bool, bad_prompt: Sequence[int] = ()) -> type[Gated]:
    class Mine(Gated):
        gate, entered = threading.Event(), threading.Event()

    Mine.bad_prompt = bad_prompt
    if is_open:
        Mine.gate.set()
    return Mine


def run(
    model: Generator, scenario: Scenario, *, size: int = 4, queue: int = 100, of: type[Decoding] = Decoding
) -> None:
    async def main() -> None:
        options = BatchOptions(max_batch_size=size, max_queue_size=queue)
        scheduler = Scheduler(lambda: of(model.engine, pad_id=0), options)
        scheduler.start()
        await scenario(scheduler)
        await scheduler.close()

    asyncio.run(main())


async def tokens_of(answer: Answer) -> list[int]:
    return [piece.token async for piece in answer]


def begun(model: Generator, prompts: Sequence[list[int]], *, new: int) -> list[Continuation]:
    return [model.begin(prompt, max_new_tokens=new) for prompt in prompts]


def test_everyone_gets_what_they_would_get_alone(model: Generator) -> None:
    random = np.random.default_rng(0)
    prompts = [random.integers(4, 35, int(random.integers(1, 20))).tolist() for _ in range(30)]
    alone = [model.generate([prompt], max_new_tokens=30)[0] for prompt in prompts]

    async def scenario(scheduler: Scheduler) -> None:
        answers = [scheduler.submit([one])[0] for one in begun(model, prompts, new=30)]
        found = await asyncio.gather(*map(tokens_of, answers))
        assert found == alone
        for answer, tokens in zip(answers, alone, strict=True):
            assert answer.continuation.tokens == tokens
            assert answer.continuation.text == model.encoder.decode([tokens])[0]
            assert answer.continuation.finish == ("stop" if tokens[-1] == 3 else "length")

    run(model, scenario)


def test_who_went_away_is_left_out_and_frees_the_place(model: Generator) -> None:
    decoding = gated(model, is_open=False)

    async def scenario(scheduler: Scheduler) -> None:
        first, waits, last = scheduler.submit(begun(model, [[5, 6], [7], [8]], new=40))
        await asyncio.to_thread(decoding.entered.wait)
        first.cancel()  # its prompt is with the engine already
        waits.cancel()
        decoding.gate.set()
        assert await tokens_of(last) == model.generate([[8]], max_new_tokens=40)[0]
        assert len(first.continuation.tokens) == 1
        assert waits.continuation.tokens == []

    run(model, scenario, size=1, of=decoding)


def test_a_full_queue_takes_all_or_nothing(model: Generator) -> None:
    decoding = gated(model, is_open=False)

    async def scenario(scheduler: Scheduler) -> None:
        (first,) = scheduler.submit(begun(model, [[5]], new=3))
        await asyncio.to_thread(decoding.entered.wait)
        (second,) = scheduler.submit(begun(model, [[6]], new=3))
        with pytest.raises(QueueFullError) as caught:
            scheduler.submit(begun(model, [[7], [8]], new=3))
        assert caught.value.retry_after_s >= 0
        (third,) = scheduler.submit(begun(model, [[9]], new=3))
        second.cancel()  # and who has gone takes no place
        (fourth,) = scheduler.submit(begun(model, [[10]], new=3))
        decoding.gate.set()
        for answer, prompt in ((first, 5), (third, 9), (fourth, 10)):
            assert await tokens_of(answer) == model.generate([[prompt]], max_new_tokens=3)[0]

    run(model, scenario, size=1, queue=2, of=decoding)


def test_one_bad_prompt_harms_no_other(model: Generator) -> None:
    async def scenario(scheduler: Scheduler) -> None:
        answers = scheduler.submit(begun(model, [[5], [13, 13], [6]], new=9))
        found = await asyncio.gather(*map(tokens_of, answers), return_exceptions=True)
        assert isinstance(found[1], ValueError)
        assert [found[0], found[2]] == [model.generate([[prompt]], max_new_tokens=9)[0] for prompt in (5, 6)]

    run(model, scenario, of=gated(model, is_open=True, bad_prompt=[13, 13]))


def test_a_text_that_cannot_be_decoded_harms_no_other(model: Generator) -> None:
    async def scenario(scheduler: Scheduler) -> None:
        continuations = begun(model, [[5], [7], [6]], new=9)
        continuations[1]._decode = lambda tokens: 1 // 0  # type: ignore[assignment,return-value]
        found = await asyncio.gather(*map(tokens_of, scheduler.submit(continuations)), return_exceptions=True)
        assert isinstance(found[1], ZeroDivisionError)
        assert [found[0], found[2]] == [model.generate([[prompt]], max_new_tokens=9)[0] for prompt in (5, 6)]

    run(model, scenario)


def test_a_failed_step_ends_its_texts_and_the_next_are_answered(model: Generator) -> None:
    decoding = gated(model, is_open=True)
    decoding.bad_steps = True

    async def scenario(scheduler: Scheduler) -> None:
        found = await asyncio.gather(
            *map(tokens_of, scheduler.submit(begun(model, [[5], [6]], new=9))), return_exceptions=True
        )
        assert [type(each) for each in found] == [ValueError, ValueError]
        decoding.bad_steps = False
        (answer,) = scheduler.submit(begun(model, [[7]], new=9))
        assert await tokens_of(answer) == model.generate([[7]], max_new_tokens=9)[0]

    run(model, scenario, of=decoding)


def test_close_finishes_what_was_accepted_and_refuses_the_rest(model: Generator) -> None:
    decoding = gated(model, is_open=False)

    async def scenario(scheduler: Scheduler) -> None:
        answers = scheduler.submit(begun(model, [[5], [6], [7]], new=9))
        await asyncio.to_thread(decoding.entered.wait)
        closing = asyncio.create_task(scheduler.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            scheduler.submit(begun(model, [[8]], new=9))
        decoding.gate.set()
        await closing
        for answer, prompt in zip(answers, (5, 6, 7), strict=True):
            assert await tokens_of(answer) == model.generate([[prompt]], max_new_tokens=9)[0]

    run(model, scenario, size=1, of=decoding)
