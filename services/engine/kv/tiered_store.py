"""The store of an engine: RAM first, then what the cache service knows; saves go to RAM at once and to the roots behind it.

Everything here is an optimisation: a cache service that is down or slow, a broken file, a hung disk cost a bounded time and then
go cold (I7). What was found is exact: every block was compared with the prompt's tokens (I2).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Final

from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2 as engine_pb

from services.engine.kv.block_file import LoadedBlock
from services.engine.kv.blocking import RunBlocking
from services.engine.kv.fetch import BlockServer
from services.engine.kv.holdings import Holdings
from services.engine.kv.keys import Namespace
from services.engine.kv.known import KnownKeys
from services.engine.kv.kvc import KvcError
from services.engine.kv.ledger import CacheDown, Ledger
from services.engine.kv.publisher import Publisher
from services.engine.kv.restore import Failure, Restorer
from services.engine.kv.root import RootError
from services.engine.kv.rows import block_of
from services.engine.kv.search import Search
from services.engine.kv.session import CacheSession
from services.engine.kv.stats import KvStats
from services.engine.kv.store import FoundBlock, SavedBlock, Source
from services.runtime.clock import Clock

_LOG = logging.getLogger(__name__)
REFUSED_MAX: Final = 4096
"""States refused by llama.cpp that are remembered."""


@dataclass(frozen=True)
class CacheLink:
    """What connects an engine with the cache service."""

    session: CacheSession
    ledger: Ledger
    publisher: Publisher


class TieredStore:
    """See store.BlockStore. `link` is None where there is no cache service. Made on the event loop."""

    def __init__(
        self,
        namespace: Namespace,
        holdings: Holdings,
        link: CacheLink | None,
        *,
        restorer: Restorer,
        server: BlockServer,
        checkers: RunBlocking,
        keeper: RunBlocking,
        known: KnownKeys,
        stats: KvStats,
        clock: Clock,
        wait_seconds: float,
    ) -> None:
        self.namespace = namespace
        self.stats = stats
        self._holdings = holdings
        self._ram = holdings.ram
        self._link = link
        self._restorer = restorer
        self._server = server
        # Apart, so that a check, which a request waits for, never stands behind a disk that hangs.
        self._checkers = checkers
        self._keeper = keeper
        self._known = known
        self._clock = clock
        self._wait_seconds = wait_seconds
        self._refused = KnownKeys(REFUSED_MAX)
        self._loop = asyncio.get_running_loop()
        self._chores: set[asyncio.Task[None]] = set()
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
        have: int,
        *,
        namespace: Namespace,
        parent_key: bytes = b"",
    ) -> list[FoundBlock]:
        """See BlockStore.find."""
        began = self._clock.monotonic()
        search = Search(prompt, keys, have, namespace, self.namespace, parent_key)
        try:
            self._search_ram(search)
            if not search.complete and self._link is not None:
                await self._search_service(search, self._link.ledger)
        except CacheDown as error:
            self.stats.acquire_failures += 1
            _LOG.debug("a lookup goes on without the cache service: %s", error)
        except Exception:
            # The last guard of I7: a defect of the cache must not become one of the request.
            _LOG.exception("a lookup failed")
        self._count(search, began)
        return search.found

    def _count(self, search: Search, began: float) -> None:
        stats = self.stats
        stats.finds += 1
        stats.misses += not search.found
        for block in search.found:
            stats.blocks_found[block.source] += 1
        stats.partial_hits += search.has_partial
        stats.load_total_ns += round((self._clock.monotonic() - began) * 1e9)

    def _search_ram(self, search: Search) -> None:
        search.add_ram(self._ram.chain(search.missing()))
        if search.chain_complete and search.tail:
            partial = self._ram.partial(search.parent(), search.tail)
            if partial is not None:
                search.add_ram_partial(*partial)

    async def _search_service(self, search: Search, ledger: Ledger) -> None:
        """Asks the service; waits for a save of the parent key that is in flight, and asks again (S2.31, W38)."""
        until = self._clock.monotonic() + self._wait_seconds
        while True:
            depth = search.depth
            pending = await self._ask(search, ledger)
            left_s = until - self._clock.monotonic()
            if search.complete or not search.awaits_parent or left_s <= 0:
                return
            if pending is None or (search.waited and search.depth == depth):
                return  # It failed, or waiting has brought nothing new.
            if not search.waited:
                self.stats.waits += 1
            search.waited = True
            outcome = await ledger.wait(pending or search.parent_key, left_s)
            if outcome != pb.WAIT_OUTCOME_AVAILABLE:
                return
            self._search_ram(search)

    async def _ask(self, search: Search, ledger: Ledger) -> bytes | None:
        """Acquires, loads and releases; returns the key that is being saved, b"" if none, None if a block failed."""
        response = await ledger.acquire(
            search.salted.root_key(), search.keys, search.depth, search.tail
        )
        try:
            wanted = search.wanted(response)
            self._learn(search, response)
            usable = len(wanted)
            for index, one in enumerate(wanted):
                if one.expected.key in self._refused:
                    usable = index
                    break
            restored = await self._restorer.load(wanted[:usable])
        finally:
            if response.claim_id:
                ledger.release_soon(response.claim_id)
        for one, block in zip(wanted, restored.blocks, strict=False):
            try:
                await self._take(search, block, one.source)
            except KvcError as error:
                self._fail(Failure(one, error))
                return None
        if restored.failure is not None:
            self._fail(restored.failure)
            return None
        return response.pending_key if usable == len(wanted) else None

    async def _take(self, search: Search, block: LoadedBlock, source: Source) -> None:
        """Adds a loaded block to what is found, and keeps it in RAM. Raises KvcError."""
        saved = block_of(block.meta, block.state)
        if search.chain_complete:
            await self._checkers(lambda: search.check_key(block.meta, saved.tokens))
        search.add_loaded(saved, source)
        self._ram.put(saved, block.meta.created)

    def _learn(self, search: Search, response: pb.AcquireResponse) -> None:
        """The service has just said which blocks are published within reach."""
        missing = search.missing()
        for key, copy in zip(missing, response.blocks, strict=False):
            if copy.WhichOneof("place") == "root_id":
                self._known.add(key)
        self._known.discard(missing[len(response.blocks) :])

    def _fail(self, failure: Failure) -> None:
        """A block could not be used: what is bad or gone is withdrawn, so that it can be saved again (W30)."""
        expected, error = failure.wanted.expected, failure.error
        root_id = failure.wanted.root_id
        _LOG.warning("block %s: %s: %s", expected.key.hex(), type(error).__name__, error)
        if failure.is_bad:
            self.stats.corrupt_files += 1
            if root_id:
                self._chore(self._withdraw(root_id, expected.key))
        elif failure.is_missing:
            self.stats.missing_files += 1
            self._known.discard([expected.key])
            if root_id and self._link is not None:
                self._link.session.withdraw(root_id, expected.key, corrupt=False)
        else:
            self.stats.read_failures += 1

    # --- withdraw ------------------------------------------------------------------------------------------------

    def bad(self, key: bytes) -> None:
        """See BlockStore.bad."""
        self._refused.add(key)
        self._ram.drop([key])
        self._soon(self._withdraw_everywhere, key)

    def _soon(self, work: Callable[..., None], *args: object) -> None:
        """Does something on the event loop, unless that has ended: the decode thread may outlive it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work, *args)

    def _withdraw_everywhere(self, key: bytes) -> None:
        self.stats.refused_states += 1
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
        if self._link is not None:
            self._link.session.withdraw(root_id, key, corrupt=True)

    def _chore(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    # --- save ----------------------------------------------------------------------------------------------------

    def save(self, block: SavedBlock) -> bool:
        """See BlockStore.save."""
        self._refused.discard([block.key])
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
        await asyncio.gather(*self._chores, return_exceptions=True)
