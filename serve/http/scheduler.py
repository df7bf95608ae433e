"""Texts of several requests grow together, each from the moment it comes until it ends. Knows nothing of HTTP.

    scheduler = Scheduler(generator.decoding, BatchOptions(max_batch_size=8))
    scheduler.start()
    (answer,) = scheduler.submit([generator.begin("Once upon", max_new_tokens=20)])
    async for piece in answer: ...                     # one for every token
    await scheduler.close()                            # waits for everything that was accepted

Each round reads the last token of every text in the batch in one inference, and then one prompt that waits, alone: a
long prompt pads no other, and holds the others up once. Nobody waits for company, so max_queue_delay_ms is not used.
"""

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from serve.continuation import Continuation
from serve.decoding import Decoding
from serve.http.batcher import BatchOptions, QueueFullError
from serve.http.worker import Worker


class Piece(NamedTuple):
    """One token, and the text that has become certain by it, which may be empty."""

    token: int
    text: str


class Answer:
    """A text that was accepted; iterated over once. *continuation* has the whole when the last piece has come."""

    def __init__(self, continuation: Continuation, *, arrived: float) -> None:
        self.continuation, self.arrived = continuation, arrived
        self.gone = False
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """Nobody waits for it any more: it is left out from the next round on."""
        self.gone = True

    def put(self, piece: Piece | Exception) -> None:
        """What its reader gets next; an exception is raised there."""
        self._pieces.put_nowait(piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        count = 0
        while self.continuation.finish is None or count < len(self.continuation.tokens):
            piece = await self._pieces.get()
            if isinstance(piece, Exception):
                raise piece
            count += 1
            yield piece


class Scheduler(Worker):
    """Rounds of one worker thread. All methods belong to one event loop."""

    def __init__(
        self, decoding: Callable[[], Decoding], options: BatchOptions, *, thread: ThreadPoolExecutor | None = None
    ) -> None:
        super().__init__(name="scheduler", thread=thread)
        self._new_decoding = decoding
        self._decoding = decoding()
        self._max_batch_size = options.max_batch_size
        self._max_queue_size = options.max_queue_size
        self._waiting: collections.deque[Answer] = collections.deque()
        self._running: list[Answer] = []  # the rows of the decoding
        self._answer_s = 0.0

    def submit(self, continuations: Sequence[Continuation]) -> list[Answer]:
        """An answer to each, in their order. All are accepted or none. Raises QueueFullError or ClosedError."""
        self._require_open()
        self._waiting = collections.deque(answer for answer in self._waiting if not answer.gone)
        if len(self._waiting) + len(continuations) > self._max_queue_size:
            raise QueueFullError((len(self._waiting) / self._max_batch_size + 1) * self._answer_s)
        now = asyncio.get_running_loop().time()
        answers = [Answer(continuation, arrived=now) for continuation in continuations]
        self._waiting.extend(answers)
        self._arrival.set()
        return answers

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            rows = [not answer.gone and answer.continuation.finish is None for answer in self._running]
            stay = [answer for answer, stays in zip(self._running, rows, strict=True) if stays]
            joins = self._next_to_join() if len(stay) < self._max_batch_size else None
            if not stay and joins is None and not self._waiting:
                # Without a row there is nothing to keep of the cache either.
                self._running, self._decoding = [], self._new_decoding()
                if self._closing:
                    return
                self._arrival.clear()
                await self._arrival.wait()
                continue
            took = await loop.run_in_executor(self._executor, self._round, np.array(rows, dtype=bool), stay, joins)
            self._running = [answer for answer, piece in took if not isinstance(piece, Exception)]
            for answer, piece in took:
                answer.put(piece)
                if answer.continuation.finish is not None:
                    self._answer_s = loop.time() - answer.arrived

    def _next_to_join(self) -> Answer | None:
        while self._waiting:
            answer = self._waiting.popleft()
            if not answer.gone:
                return answer
        return None

    def _round(
        self, rows: "np.ndarray", stay: list[Answer], joins: Answer | None
    ) -> list[tuple[Answer, Piece | Exception]]:
        """A piece or an exception of each. What fails for all ends them all, and the next find an empty cache."""
        took: list[tuple[Answer, Piece | Exception]] = []
        try:
            self._decoding.keep(rows)
            if stay:
                logits = self._decoding.step(np.array([answer.continuation.tokens[-1] for answer in stay]))
                took += [(answer, _take(answer, row)) for answer, row in zip(stay, logits, strict=True)]
        except Exception as error:
            self._decoding = self._new_decoding()
            took = [(answer, error) for answer in stay]
        if joins is not None:
            before = len(self._decoding)
            try:
                took.append((joins, _take(joins, self._decoding.join([joins.continuation.prompt])[0])))
            except Exception as error:
                self._decoding.keep(np.arange(len(self._decoding)) < before)
                took.append((joins, error))
        return took


def _take(answer: Answer, logits: "np.ndarray") -> Piece:
    text = answer.continuation.take(logits)
    return Piece(answer.continuation.tokens[-1], text)
