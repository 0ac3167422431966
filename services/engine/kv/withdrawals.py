"""Takes back what turned out to be bad or gone, so that nobody reads it again and it can be saved again (W30)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Final

from services.engine.kv.blocking import RunBlocking
from services.engine.kv.holdings import Holdings
from services.engine.kv.known import KnownKeys
from services.engine.kv.restore import Failure
from services.engine.kv.root import RootError
from services.engine.kv.session import CacheSession
from services.engine.kv.stats import KvStats

_LOG = logging.getLogger(__name__)
REFUSED_MAX: Final = 4096
"""States refused by llama.cpp that are remembered."""


class Withdrawals:
    """Made on the event loop. `session` is None where there is no cache service; `keeper` runs what blocks."""

    def __init__(
        self,
        holdings: Holdings,
        session: CacheSession | None,
        keeper: RunBlocking,
        known: KnownKeys,
        stats: KvStats,
    ) -> None:
        self.refused = KnownKeys(REFUSED_MAX)
        """States that llama.cpp did not take."""
        self._holdings = holdings
        self._session = session
        self._keeper = keeper
        self._known = known
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._chores: set[asyncio.Task[None]] = set()

    def failed(self, failure: Failure) -> None:
        """A block could not be used. On the event loop."""
        expected, error = failure.wanted.expected, failure.error
        root_id = failure.wanted.root_id
        _LOG.warning("block %s: %s: %s", expected.key.hex(), type(error).__name__, error)
        if failure.is_bad:
            self._stats.corrupt_files += 1
            if root_id:
                self._chore(self._withdraw(root_id, expected.key))
        elif failure.is_missing:
            self._stats.missing_files += 1
            self._known.discard([expected.key])
            if root_id and self._session is not None:
                self._session.withdraw(root_id, expected.key, corrupt=False)
        else:
            self._stats.read_failures += 1

    def bad(self, key: bytes) -> None:
        """llama.cpp refused this state. Any thread."""
        self.refused.add(key)
        self._holdings.ram.drop([key])
        # The decode thread may outlive the event loop.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._withdraw_everywhere, key)

    def _withdraw_everywhere(self, key: bytes) -> None:
        self._stats.refused_states += 1
        for root_id in self._holdings.roots:
            self._chore(self._withdraw(root_id, key))

    async def _withdraw(self, root_id: str, key: bytes) -> None:
        """Deletes a bad file and tells the service."""
        self._known.discard([key])
        root = self._holdings.roots[root_id].root
        if root.writable:
            try:
                await self._keeper(lambda: root.delete(key))
            except RootError as error:
                _LOG.warning("a bad file stays: %s", error)
        if self._session is not None:
            self._session.withdraw(root_id, key, corrupt=True)

    def _chore(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    async def settle(self) -> None:
        """Waits until withdrawals that were begun are done."""
        await asyncio.gather(*self._chores, return_exceptions=True)
