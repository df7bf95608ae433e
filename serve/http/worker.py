"""A loop of rounds beside the event loop's requests, whose heavy part runs in one thread of its own."""

import asyncio
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor


class ClosedError(Exception):
    """The worker takes no more items."""


class Worker(ABC):
    """Started once, closed once. All methods belong to one event loop."""

    def __init__(self, *, name: str, thread: ThreadPoolExecutor | None = None) -> None:
        """*thread*: one that close ends as well; None makes one of that *name*."""
        self._arrival = asyncio.Event()
        """Set where something came in, or the worker closes."""
        self._executor = thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        """Begin with the rounds; items may be submitted from now on."""
        self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Refuse new items, finish those accepted, and end the thread."""
        self._closing = True
        self._arrival.set()
        if self._task is not None:
            await self._task
        self._executor.shutdown()

    def _require_open(self) -> None:
        """Raise ClosedError before the start and from the closing on."""
        if self._closing or self._task is None:
            raise ClosedError

    @abstractmethod
    async def _work(self) -> None:
        """Rounds until the worker closes and nothing is left to do."""
