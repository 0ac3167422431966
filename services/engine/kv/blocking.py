"""Blocking work away from the event loop, on a bounded number of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs work on another thread."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """The result of `work`. Work that has begun is not ended by a cancel: only its result is lost."""
        ...


class BlockingPool:
    """Threads of one purpose, so that a slow disk delays its own kind of work alone."""

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """See RunBlocking."""
        return asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Forgets work that has not begun; does not wait for what has."""
        self._executor.shutdown(wait=False, cancel_futures=True)
