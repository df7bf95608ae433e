"""The batcher alone, with functions in place of models."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from serve.http.batcher import Batcher, BatchOptions, QueueFullError
from serve.http.worker import ClosedError

Run = Callable[[list[int]], Sequence[int]]


def doubled(items: list[int]) -> list[int]:
    return [2 * item for item in items]


class Recorder:
    """Doubles numbers, notes every batch, and holds each until ``gate`` is set."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.entered = threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(10)
        return doubled(items)


def batcher_of(run: Run, *, size: int = 4, delay_ms: float = 10.0, queue: int = 100) -> Batcher[int, int]:
    options = BatchOptions(max_batch_size=size, max_queue_delay_ms=delay_ms, max_queue_size=queue)
    batcher = Batcher[int, int](run, options)
    batcher.start()
    return batcher


def test_everyone_gets_their_own_answers() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher = batcher_of(recorder)
        answers = await asyncio.gather(*(batcher.submit([i, 100 + i]) for i in range(50)))
        await batcher.close()
        assert answers == [[2 * i, 200 + 2 * i] for i in range(50)]
        assert sorted(item for batch in recorder.batches for item in batch) == sorted([*range(50), *range(100, 150)])
        assert max(len(batch) for batch in recorder.batches) == 4
        assert len(recorder.threads) == 1
        assert threading.get_ident() not in recorder.threads

    asyncio.run(main())


def test_what_waits_while_the_engine_works_shares_a_batch() -> None:
    async def main() -> None:
        recorder = Recorder(is_open=False)
        batcher = batcher_of(recorder, delay_ms=0.0)
        first = asyncio.create_task(batcher.submit([0]))
        await asyncio.to_thread(recorder.entered.wait)
        others = [asyncio.create_task(batcher.submit([i])) for i in range(1, 7)]
        await asyncio.sleep(0)
        recorder.gate.set()
        await asyncio.gather(first, *others)
        await batcher.close()
        assert recorder.batches == [[0], [1, 2, 3, 4], [5, 6]]

    asyncio.run(main())


def test_the_first_waits_for_company() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher = batcher_of(recorder, size=2, delay_ms=10_000.0)
        one = asyncio.create_task(batcher.submit([1]))
        await asyncio.sleep(0)
        assert await batcher.submit([2]) == [4]  # the batch is full: nobody waits for the delay to end
        assert await one == [2]
        await batcher.close()
        assert recorder.batches == [[1, 2]]

    asyncio.run(main())


def test_a_lone_item_is_answered_after_the_delay() -> None:
    async def main() -> None:
        batcher = batcher_of(doubled, delay_ms=1.0)
        assert await batcher.submit([3]) == [6]
        assert await batcher.submit([]) == []
        await batcher.close()

    asyncio.run(main())


def test_full_queue_takes_all_or_nothing() -> None:
    async def main() -> None:
        recorder = Recorder(is_open=False)
        batcher = batcher_of(recorder, size=1, delay_ms=0.0, queue=2)
        first = asyncio.create_task(batcher.submit([0]))
        await asyncio.to_thread(recorder.entered.wait)
        waiting = asyncio.create_task(batcher.submit([1]))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as caught:
            await batcher.submit([2, 3])
        assert caught.value.retry_after_s >= 0
        last = asyncio.create_task(batcher.submit([4]))
        await asyncio.sleep(0)
        recorder.gate.set()
        assert [await first, await waiting, await last] == [[0], [2], [8]]
        await batcher.close()
        assert recorder.batches == [[0], [1], [4]]

    asyncio.run(main())


def test_one_bad_item_harms_no_other() -> None:
    def picky(items: list[int]) -> list[int]:
        if 13 in items:
            raise ValueError("13 is unlucky")
        return doubled(items)

    async def main() -> None:
        batcher = batcher_of(picky, delay_ms=50.0)
        answers = await asyncio.gather(*(batcher.submit([i]) for i in (11, 12, 13, 14)), return_exceptions=True)
        await batcher.close()
        assert [answers[0], answers[1], answers[3]] == [[22], [24], [28]]
        assert isinstance(answers[2], ValueError)

    asyncio.run(main())


def test_who_went_away_is_left_out() -> None:
    async def main() -> None:
        recorder = Recorder(is_open=False)
        batcher = batcher_of(recorder, delay_ms=0.0)
        first = asyncio.create_task(batcher.submit([0]))
        await asyncio.to_thread(recorder.entered.wait)
        gone, stays = asyncio.create_task(batcher.submit([1])), asyncio.create_task(batcher.submit([2]))
        await asyncio.sleep(0)
        gone.cancel()
        first.cancel()  # its batch is already with the engine
        await asyncio.sleep(0)
        recorder.gate.set()
        assert await stays == [4]
        await batcher.close()
        assert recorder.batches == [[0], [2]]

    asyncio.run(main())


def test_close_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        recorder = Recorder(is_open=False)
        batcher = batcher_of(recorder, size=1, delay_ms=10_000.0)
        accepted = [asyncio.create_task(batcher.submit([i])) for i in range(3)]
        await asyncio.to_thread(recorder.entered.wait)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(ClosedError):
            await batcher.submit([9])
        recorder.gate.set()
        await closing
        assert [await task for task in accepted] == [[0], [2], [4]]

    asyncio.run(main())


def test_not_started() -> None:
    async def main() -> None:
        batcher = Batcher[int, int](doubled, BatchOptions())
        with pytest.raises(ClosedError):
            await batcher.submit([1])
        await batcher.close()

    asyncio.run(main())
