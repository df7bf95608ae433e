"""Requests that arrive together share one inference. Knows nothing of HTTP, models or runtimes.

    batcher = Batcher(run, BatchOptions(max_batch_size=8, max_queue_delay_ms=2.0, max_queue_size=256))
    batcher.start()
    results = await batcher.submit(["one", "two"])     # run may see these among other callers' items
    await batcher.close()                              # waits for everything that was accepted

``run`` takes a list of items and gives a result for each, in order. It is called from one thread of the batcher's own,
one batch at a time. The first item of a batch waits at most max_queue_delay for company.
"""

import asyncio
import collections
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pst.errors import ConfigError
from serve.http.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How requests share inferences. Raises ConfigError for values that make no sense."""

    max_batch_size: int = 16
    """Texts in one inference at most."""
    max_queue_delay_ms: float = 1.0
    """Milliseconds that the first text of a batch waits for others."""
    max_queue_size: int = 512
    """Texts that wait at most; further requests get 503."""

    def __post_init__(self) -> None:
        if self.max_batch_size < 1 or self.max_queue_size < self.max_batch_size:
            raise ConfigError(
                f"max_batch_size {self.max_batch_size} must be 1 or more, and max_queue_size {self.max_queue_size} "
                "must not be below it."
            )
        if not 0 <= self.max_queue_delay_ms <= 10_000:
            raise ConfigError(f"max_queue_delay_ms {self.max_queue_delay_ms} must lie between 0 and 10000.")


class QueueFullError(Exception):
    """The queue has no room for the items; retry_after_s estimates when it will."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class _Entry(NamedTuple):
    item: object
    future: "asyncio.Future[object]"
    arrived: float


class Batcher(Worker, Generic[Item, Result]):
    """Collects items into batches for one worker thread. All methods belong to one event loop."""

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        options: BatchOptions,
        *,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        super().__init__(name="batcher", thread=thread)
        self._run = run
        self._max_batch_size = options.max_batch_size
        self._max_queue_delay_s = options.max_queue_delay_ms / 1000
        self._max_queue_size = options.max_queue_size
        self._queue: collections.deque[_Entry] = collections.deque()
        self._batch_s = 0.0

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Results of *items* in their order. All are accepted or none.

        Raises QueueFullError, ClosedError, or what ``run`` raises for one of them alone.
        """
        self._require_open()
        if len(self._queue) + len(items) > self._max_queue_size:
            batches = len(self._queue) / self._max_batch_size + 1
            raise QueueFullError(batches * self._batch_s)
        loop = asyncio.get_running_loop()
        entries = [_Entry(item, loop.create_future(), loop.time()) for item in items]
        self._queue.extend(entries)
        self._arrival.set()
        try:
            results = await asyncio.gather(*(entry.future for entry in entries))
        except BaseException:
            # One item failed, or the caller went away: nobody waits for the others.
            for entry in entries:
                entry.future.cancel()
            raise
        return results  # type: ignore[return-value]

    async def _work(self) -> None:
        while True:
            while not self._queue:
                if self._closing:
                    return
                self._arrival.clear()
                await self._arrival.wait()
            await self._fill()
            batch: list[_Entry] = []
            while self._queue and len(batch) < self._max_batch_size:
                entry = self._queue.popleft()
                if not entry.future.done():
                    batch.append(entry)
            if batch:
                await self._answer(batch)

    async def _fill(self) -> None:
        """Wait until a batch is full, its first item has waited long enough, or the batcher closes."""
        loop = asyncio.get_running_loop()
        deadline = self._queue[0].arrived + self._max_queue_delay_s
        while len(self._queue) < self._max_batch_size and not self._closing and loop.time() < deadline:
            self._arrival.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrival.wait(), deadline - loop.time())

    async def _answer(self, batch: list[_Entry]) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        outcomes = await loop.run_in_executor(self._executor, self._outcomes, [entry.item for entry in batch])
        self._batch_s = loop.time() - start
        for entry, outcome in zip(batch, outcomes, strict=True):
            if entry.future.done():  # cancelled meanwhile
                continue
            if isinstance(outcome, BaseException):
                entry.future.set_exception(outcome)
            else:
                entry.future.set_result(outcome)

    def _outcomes(self, items: list[object]) -> Sequence[object]:
        """A result or an exception per item. A batch that fails is run again item by item: one harms no other."""
        try:
            return self._run(items)  # type: ignore[arg-type]
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [self._outcomes([item])[0] for item in items]
