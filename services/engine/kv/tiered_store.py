"""The store of an engine: RAM first, then what the cache service knows; saves go to RAM at once and to the roots behind it.

Everything here is an optimisation: a cache service that is down or slow, a broken file, a hung disk cost a bounded time and then
go cold (I7). What was found is exact: every block was compared with the prompt's tokens (I2).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.engine.kv.fetch import BlockServer
from services.engine.kv.keys import BLOCK_TOKENS, Namespace
from services.engine.kv.ledger import CacheDown, Ledger
from services.engine.kv.publisher import Publisher
from services.engine.kv.session import CacheSession
from services.engine.kv.state_finder import FindingParts, StateFinder
from services.engine.kv.store import Asked, FoundBlock, SavedBlock

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheLink:
    """What connects an engine with the cache service."""

    session: CacheSession
    ledger: Ledger
    publisher: Publisher


class TieredStore:
    """See store.BlockStore. `link` is None where there is no cache service. Made on the event loop."""

    def __init__(
        self, parts: FindingParts, link: CacheLink | None, finder: StateFinder, server: BlockServer
    ) -> None:
        self.namespace = parts.namespace
        self.stats = parts.stats
        self._ram = parts.ram
        self._link = link
        self._finder = finder
        self._withdrawals = parts.withdrawals
        self._server = server
        self._known = parts.known
        self._clock = parts.clock
        self._loop = asyncio.get_running_loop()
        if link is not None:
            changed = link.session.ram_changed
            self._ram.on_change = lambda: self._soon(changed)
            link.session.on_joined = self.publish_ram

    @property
    def ram_bytes(self) -> int:
        """Bytes of the blocks in RAM."""
        return self._ram.bytes

    @property
    def queued_bytes(self) -> int:
        """Bytes of the blocks on their way to the roots."""
        return 0 if self._link is None else self._link.publisher.queued_bytes

    @property
    def evictions(self) -> int:
        """Blocks that went from RAM for want of room."""
        return self._ram.evictions

    @property
    def joined(self) -> bool:
        """Whether there is a session with the cache service."""
        return self._link is not None and self._link.session.joined

    # --- find ----------------------------------------------------------------------------------------------------

    async def find(
        self,
        prompt: Sequence[int],
        keys: Sequence[bytes],
        held: int,
        *,
        namespace: Namespace,
        parent_key: bytes = b"",
    ) -> list[FoundBlock]:
        """See BlockStore.find."""
        began = self._clock.monotonic()
        found: list[FoundBlock] = []
        try:
            await self._finder.find(Asked(prompt, keys, held, namespace, parent_key), found)
        except CacheDown as error:
            self.stats.acquire_failures += 1
            _LOG.debug("a lookup goes on without the cache service: %s", error)
        except Exception:
            # The last guard of I7: a defect of the cache must not become one of the request.
            _LOG.exception("a lookup failed")
        self._count(found, began)
        return found

    def _count(self, found: Sequence[FoundBlock], began: float) -> None:
        stats = self.stats
        stats.finds += 1
        stats.misses += not found
        for block in found:
            stats.blocks_found[block.source] += 1
        stats.partial_hits += bool(found) and found[-1].end % BLOCK_TOKENS != 0
        stats.load_total_ns += round((self._clock.monotonic() - began) * 1e9)

    # --- withdraw ------------------------------------------------------------------------------------------------

    def bad(self, key: bytes) -> None:
        """See BlockStore.bad."""
        self._withdrawals.bad(key)

    def _soon(self, work: Callable[[], None]) -> None:
        """Does something on the event loop, unless that has ended: the decode thread may outlive it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    # --- save ----------------------------------------------------------------------------------------------------

    def save(self, block: SavedBlock) -> bool:
        """See BlockStore.save."""
        self._withdrawals.refused.discard([block.key])
        kept = self._ram.put(block, self._clock.wall())
        queued = self._link is not None and self._link.publisher.offer(block)
        return queued or kept or self.holds(block.key)

    def holds(self, key: bytes) -> bool:
        """See BlockStore.holds."""
        if key in self._ram or key in self._known:
            return True
        return self._link is not None and self._link.publisher.has(key)

    def publish_ram(self) -> None:
        """Publishes what RAM has and no root is known to have: it was saved while the cache service was away.

        As much as the queue takes.
        """
        if self._link is None:
            return
        publisher = self._link.publisher
        for entry in self._ram.entries():
            key = entry.block.key
            if key in self._known or publisher.has(key):
                continue
            if not publisher.offer(entry.block):
                return

    # --- serve ---------------------------------------------------------------------------------------------------

    def serve_blocks(self, keys: Sequence[bytes]) -> AsyncIterator[engine_pb.FetchBlocksResponse]:
        """Blocks for another engine, as EngineService.FetchBlocks sends them. Raises CaravanError: INVALID_VALUE."""
        return self._server.serve(keys)

    async def settle(self) -> None:
        """Waits until withdrawals that were begun are done."""
        await self._withdrawals.settle()
