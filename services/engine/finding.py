"""Looks into the store for what the cells do not hold of a prompt. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.inflight import Inflight
from services.engine.job import Work
from services.engine.kv.store import FoundBlock
from services.engine.kv.tiered_store import TieredStore
from services.runtime.clock import Clock


@dataclass(frozen=True, slots=True)
class Restorable:
    """What the store has of a prompt, and the seconds that it took to find."""

    blocks: Sequence[FoundBlock] = ()
    seconds: float = 0.0


class Finder:
    """Searches that can be given up. Less than `least_tokens` are not looked for."""

    def __init__(self, clock: Clock, least_tokens: int) -> None:
        self._clock = clock
        self._least_tokens = least_tokens
        self._searches: dict[Inflight, asyncio.Future[list[FoundBlock]]] = {}

    @property
    def searches(self) -> int:
        """Searches that run."""
        return len(self._searches)

    async def find(self, store: TieredStore, row: Inflight, work: Work, held: int) -> Restorable:
        """What the store has of the tokens of a request beyond the `held` ones. A search that is given up finds nothing."""
        cache = work.cache
        if cache.chain is None or len(work.tokens) - held <= self._least_tokens:
            return Restorable()
        began = self._clock.monotonic()
        search = asyncio.ensure_future(
            store.find(
                work.tokens,
                cache.chain.block_keys(),
                held,
                namespace=cache.chain.namespace,
                parent_key=cache.parent_key,
            )
        )
        self._searches[row] = search
        try:
            await asyncio.wait([search])
            blocks = [] if search.cancelled() else search.result()
        finally:
            search.cancel()
            del self._searches[row]
        return Restorable(blocks, self._clock.monotonic() - began)

    def give_up(self, row: Inflight) -> None:
        """Ends the search for a request, if there is one."""
        if row in self._searches:
            self._searches[row].cancel()

    def give_up_all(self) -> None:
        """Ends all searches."""
        for search in self._searches.values():
            search.cancel()
