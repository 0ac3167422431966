"""Brings the blocks of a chain into memory: files by several reader threads at once, others from the engines that have them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from services.engine.kv.block_file import LoadedBlock
from services.engine.kv.blocking import RunBlocking
from services.engine.kv.fetch import fetch_blocks
from services.engine.kv.holdings import Holdings
from services.engine.kv.kvc import Expected, KvcError
from services.engine.kv.store import Source
from services.runtime.clock import Clock
from services.runtime.server import cancel_all

STALL_PAUSE_S: Final = 5.0
"""A place that let a block wait too long, or could not be reached, is not asked for so long."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block to load: from the file in `root_id`, or, where that is empty, from the engine at `address`."""

    expected: Expected
    source: Source
    root_id: str
    address: str

    @property
    def place(self) -> str:
        """Where it comes from."""
        return self.root_id or self.address


# What says something about this process or this moment, not about the file.
_TRANSIENT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT})


@dataclass(frozen=True, slots=True)
class Failure:
    """The first block that could not be loaded, and why; TimeoutError where nothing came for too long."""

    wanted: Wanted
    error: OSError | KvcError | TimeoutError | grpc.aio.AioRpcError

    @property
    def is_missing(self) -> bool:
        """The file is gone."""
        return isinstance(self.error, FileNotFoundError)

    @property
    def is_bad(self) -> bool:
        """The block failed its checks, or its file can never be read."""
        if isinstance(self.error, KvcError):
            return True
        lasting = isinstance(self.error, OSError) and self.error.errno not in _TRANSIENT
        return lasting and not isinstance(self.error, TimeoutError | FileNotFoundError)


@dataclass(frozen=True, slots=True)
class Restored:
    """The blocks up to the first failure."""

    blocks: list[LoadedBlock]
    failure: Failure | None


class Restorer:
    """Loads chains. Each root has readers of its own, so that a disk that hangs stops no other.

    `stall_s` is how long the next block may let wait for itself, in seconds.
    """

    def __init__(
        self,
        holdings: Holdings,
        readers: Mapping[str, RunBlocking],
        clock: Clock,
        stall_s: float,
    ) -> None:
        self._holdings = holdings
        self._readers = readers
        self._clock = clock
        self._stall_s = stall_s
        self._paused_until: dict[str, float] = {}

    async def load(self, wanted: Sequence[Wanted]) -> Restored:
        """Loads the blocks in order, up to the first that fails. Cancelling it ends what is under way."""
        wanted = self._reachable(wanted)
        loop = asyncio.get_running_loop()
        arriving: list[asyncio.Future[LoadedBlock]] = [loop.create_future() for _ in wanted]
        remote: dict[str, list[int]] = {}
        tasks = []
        for index, one in enumerate(wanted):
            if one.root_id:
                tasks.append(asyncio.create_task(self._read(one, arriving[index])))
            else:
                remote.setdefault(one.address, []).append(index)
        for address, indexes in remote.items():
            expected = [wanted[index].expected for index in indexes]
            futures = [arriving[index] for index in indexes]
            tasks.append(asyncio.create_task(_fetch(address, expected, futures)))
        try:
            return await self._collect(wanted, arriving)
        finally:
            for future in arriving:
                future.cancel()
            await cancel_all(tasks)

    def _reachable(self, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
        now = self._clock.monotonic()
        for index, one in enumerate(wanted):
            if self._paused_until.get(one.place, now) > now:
                return wanted[:index]
        return wanted

    def _pause(self, place: str) -> None:
        now = self._clock.monotonic()
        others = {place: until for place, until in self._paused_until.items() if until > now}
        self._paused_until = {**others, place: now + STALL_PAUSE_S}

    async def _collect(
        self, wanted: Sequence[Wanted], arriving: Sequence[asyncio.Future[LoadedBlock]]
    ) -> Restored:
        blocks = []
        for one, future in zip(wanted, arriving, strict=True):
            try:
                async with asyncio.timeout(self._stall_s):
                    blocks.append(await future)
            except (TimeoutError, grpc.aio.AioRpcError) as error:
                self._pause(one.place)
                return Restored(blocks, Failure(one, error))
            except (OSError, KvcError) as error:
                return Restored(blocks, Failure(one, error))
        return Restored(blocks, None)

    async def _read(self, one: Wanted, arriving: asyncio.Future[LoadedBlock]) -> None:
        root = self._holdings.roots[one.root_id].root
        try:
            block = await self._readers[one.root_id](lambda: root.read(one.expected))
        except (OSError, KvcError) as error:
            _fail(arriving, error)
        except MemoryError:
            _fail(arriving, OSError(errno.ENOMEM, "no memory for a block"))
        else:
            if not arriving.done():
                arriving.set_result(block)


async def _fetch(
    address: str, expected: Sequence[Expected], arriving: Sequence[asyncio.Future[LoadedBlock]]
) -> None:
    left = iter(arriving)
    try:
        async with contextlib.aclosing(fetch_blocks(address, expected)) as blocks:
            async for block in blocks:
                future = next(left)
                if not future.done():
                    future.set_result(block)
    except (KvcError, grpc.aio.AioRpcError) as error:
        for future in left:
            _fail(future, error)
    for future in left:
        _fail(future, FileNotFoundError("the engine does not have the block any more"))


def _fail(arriving: asyncio.Future[LoadedBlock], error: Exception) -> None:
    if not arriving.done():
        arriving.set_exception(error)
        # Only the first failure of a chain is looked at; the others are no forgotten errors.
        arriving.exception()
