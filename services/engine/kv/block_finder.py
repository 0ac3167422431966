"""Finds the chain of blocks of a prompt: in RAM first, then with the cache service, and loads it."""

from __future__ import annotations

from caravan.cache.v1 import cache_service_pb2 as pb

from services.engine.kv.block_file import LoadedBlock
from services.engine.kv.blocking import RunBlocking
from services.engine.kv.kvc import KvcError
from services.engine.kv.ledger import Ledger
from services.engine.kv.restore import Failure, Wanted
from services.engine.kv.rows import block_of
from services.engine.kv.search import PART_TOKENS_LEAST, Search
from services.engine.kv.state_finder import FindingParts
from services.engine.kv.store import Asked, FoundBlock


class BlockFinder:
    """See StateFinder. `checkers` computes keys, apart from disks that may hang."""

    def __init__(self, parts: FindingParts, checkers: RunBlocking) -> None:
        self._parts = parts
        self._checkers = checkers

    async def find(self, asked: Asked, found: list[FoundBlock]) -> None:
        """Adds to `found` the chain behind the blocks that the cells hold. Raises CacheDown; what is found until then counts."""
        search = Search(asked, self._parts.namespace, found)
        self._search_ram(search)
        try:
            if not search.complete and self._parts.ledger is not None:
                await self._search_service(search, self._parts.ledger)
        finally:
            self._end_in_ram(search)

    def _search_ram(self, search: Search) -> None:
        search.add_ram(self._parts.ram.chain(search.missing()))
        if search.chain_complete and search.tail:
            partial = self._parts.ram.partial(search.parent(), search.tail)
            if partial is not None:
                search.add_ram_partial(*partial)

    def _end_in_ram(self, search: Search) -> None:
        """What RAM has of the block after all that was found."""
        if search.complete:
            return
        partial = self._parts.ram.partial(search.parent(), search.next_tokens)
        if partial is not None and partial[1] >= PART_TOKENS_LEAST:
            search.add_ram_partial(*partial)

    async def _search_service(self, search: Search, ledger: Ledger) -> None:
        """Asks the service; waits for a save of the parent key that is in flight, and asks again (S2.31, W38)."""
        until = self._parts.clock.monotonic() + self._parts.wait_seconds
        while True:
            depth = search.depth
            answer = await self._ask(search, ledger)
            left_s = until - self._parts.clock.monotonic()
            if search.complete or answer is None:
                return  # All is found, or a block failed.
            stuck = search.waited and search.depth == depth  # Waiting has brought nothing new.
            if not search.awaits_parent or left_s <= 0 or stuck:
                break
            if not search.waited:
                self._parts.stats.waits += 1
            search.waited = True
            outcome = await ledger.wait(answer.pending_key or search.parent_key, left_s)
            if outcome != pb.WAIT_OUTCOME_AVAILABLE:
                break
            self._search_ram(search)
        if answer.parts_follow:
            await self._ask_part(search, ledger)

    async def _ask(self, search: Search, ledger: Ledger) -> pb.AcquireResponse | None:
        """Asks for the chain and what follows it whole, and loads what there is; None if a block failed."""
        response = await ledger.acquire(
            search.salted.root_key(), search.keys, search.depth, search.tail
        )
        self._learn(search, response)
        whole = await self._load(search, ledger, response, search.wanted(response))
        return response if whole else None

    async def _ask_part(self, search: Search, ledger: Ledger) -> None:
        """Asks for a block that begins like the one that is missing, and loads it."""
        response = await ledger.acquire(
            search.salted.root_key(), search.keys[: search.depth], search.depth, search.next_tokens
        )
        await self._load(search, ledger, response, search.wanted_part(response))

    async def _load(
        self, search: Search, ledger: Ledger, response: pb.AcquireResponse, wanted: list[Wanted]
    ) -> bool:
        """Loads what the response has pinned, and gives the claim back; whether all of it could be taken."""
        try:
            usable = len(wanted)
            for index, one in enumerate(wanted):
                if one.expected.key in self._parts.withdrawals.refused:
                    usable = index
                    break
            restored = await self._parts.restorer.load(wanted[:usable])
        finally:
            if response.claim_id:
                ledger.release_soon(response.claim_id)
        for one, block in zip(wanted, restored.blocks, strict=False):
            try:
                await self._take(search, block, one)
            except KvcError as error:
                self._parts.withdrawals.failed(Failure(one, error))
                return False
        if restored.failure is not None:
            self._parts.withdrawals.failed(restored.failure)
            return False
        return usable == len(wanted)

    async def _take(self, search: Search, block: LoadedBlock, wanted: Wanted) -> None:
        """Adds a loaded block to what is found, and keeps it in RAM. Raises KvcError."""
        saved = block_of(block.meta, block.state)
        if wanted.expected.token_bytes is None:
            await self._checkers(lambda: search.check_key(block.meta, saved.tokens))
            search.add_loaded_part(saved, wanted.source)
        else:
            search.add_loaded(saved, wanted.source)
        self._parts.ram.put(saved, block.meta.created)

    def _learn(self, search: Search, response: pb.AcquireResponse) -> None:
        """The service has just said which blocks are published within reach."""
        missing = search.missing()
        for key, copy in zip(missing, response.blocks, strict=False):
            if copy.WhichOneof("place") == "root_id":
                self._parts.known.add(key)
        self._parts.known.discard(missing[len(response.blocks) :])
