"""Stops the world at each step of a save: wraps the two ports of services/engine/kv/publish.py.

`python -m tests.support.kv_steps ADDRESS ROOT STEP` is a process that saves one block and stands still at a step, for a test to
kill it there.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.engine.kv.block_file import TemporaryBlock
from services.engine.kv.blocking import BlockingPool
from services.engine.kv.holdings import Holdings, MountedRoot
from services.engine.kv.kvc import Expected, Head
from services.engine.kv.ledger import Ledger, Reservation
from services.engine.kv.publish import Files, Publication, Saves, publish
from services.engine.kv.ram import RamTier
from services.engine.kv.root import Linked, Root
from services.engine.kv.rows import meta_of
from services.engine.kv.session import CacheSession
from services.runtime.channel import open_channel
from services.runtime.clock import SystemClock, random_id
from tests.support.kv import NAMESPACE, chain_of, prompt_of

PROMPT = prompt_of(77, 256)
BLOCK = chain_of(PROMPT, state_bytes=300_000)[0]
QUOTA = 1 << 24

STEPS = (
    *("reserve:before", "reserve:after", "write:before", "write:middle", "write:after"),
    *("check:before", "check:after", "link:before", "link:middle", "link:after"),
    *("mark:before", "mark:after", "head:before", "head:after"),
    *("announce:before", "announce:after"),
)
"""Every point at which a save can be cut."""


class SteppedSaves:
    """The cache service, with `at(step)` awaited around each call."""

    def __init__(self, saves: Saves, at: Callable[[str], Awaitable[None]]) -> None:
        self._saves = saves
        self._at = at

    async def reserve(
        self, root_id: str, row: pb.Block
    ) -> tuple[pb.ReserveOutcome.ValueType, Reservation]:
        await self._at("reserve:before")
        answer = await self._saves.reserve(root_id, row)
        await self._at("reserve:after")
        return answer

    async def renew(self, reservation: Reservation) -> None:
        await self._saves.renew(reservation)

    async def check(self, reservation: Reservation) -> bool:
        await self._at("check:before")
        answer = await self._saves.check(reservation)
        await self._at("check:after")
        return answer

    async def mark_published(self, reservation: Reservation) -> bool:
        await self._at("mark:before")
        answer = await self._saves.mark_published(reservation)
        await self._at("mark:after")
        return answer

    async def announce(self, reservation: Reservation, row: pb.Block) -> bool:
        await self._at("announce:before")
        answer = await self._saves.announce(reservation, row)
        await self._at("announce:after")
        return answer

    async def cancel(self, reservation: Reservation) -> None:
        await self._saves.cancel(reservation)

    def doubt(self, reservation: Reservation, why: str) -> None:
        self._saves.doubt(reservation, why)


class _Between:
    """A temporary file at whose removal the world stops: its block has its name by then."""

    def __init__(self, temporary: TemporaryBlock, at: Callable[[str], None]) -> None:
        self.path = temporary.path
        self._temporary = temporary
        self._at = at

    def discard(self) -> None:
        self._at("link:middle")
        self._temporary.discard()


class SteppedFiles:
    """A root, with `at(step)` called around each operation, on the thread of the operation."""

    def __init__(self, files: Files, at: Callable[[str], None]) -> None:
        self.root_id = files.root_id
        self._files = files
        self._at = at

    def write(
        self, key: bytes, writer: str, unique: str, parts: Sequence[bytes | memoryview]
    ) -> TemporaryBlock:
        self._at("write:before")
        temporary = self._files.write(key, writer, unique, _Halting(parts, self._at))
        self._at("write:after")
        return temporary

    def link(self, temporary: TemporaryBlock, expected: Expected) -> Linked:
        self._at("link:before")
        between: Any = _Between(temporary, self._at)
        linked = self._files.link(between, expected)
        self._at("link:after")
        return linked

    def head(self, key: bytes) -> Head:
        self._at("head:before")
        head = self._files.head(key)
        self._at("head:after")
        return head

    def delete(self, key: bytes) -> None:
        self._files.delete(key)


class _Halting(Sequence[Any]):
    """Parts of a file; the world stops when the file is there and its bytes are about to be written."""

    def __init__(self, parts: Sequence[bytes | memoryview], at: Callable[[str], None]) -> None:
        self._parts = parts
        self._at = at

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        if index == len(self._parts) - 1:
            self._at("write:middle")
        return self._parts[index]


async def _save_and_stop(address: str, folder: Path, step: str) -> None:
    def stop(here: str) -> None:
        if here == step:
            print("stopped", flush=True)
            sys.stdin.read()  # Nothing ever comes: the test kills this process.

    async def stop_loop(here: str) -> None:
        stop(here)

    root = Root.open(folder, random_id)
    mounted = MountedRoot(root, pb.TIER_DISK, QUOTA)
    register = pb.Registration(engine_id="engine-crash", address="127.0.0.1:1")
    register.roots.append(mounted.to_proto())
    pool = BlockingPool(2, "kv")
    async with open_channel(address) as channel:
        stub: pb_grpc.CacheServiceAsyncStub = pb_grpc.CacheServiceStub(channel)
        holdings = Holdings([mounted], RamTier(0))
        session = CacheSession(stub, holdings, register, blocking=pool, jitter=lambda: 0.0)
        joined = asyncio.Event()
        session.on_joined = joined.set
        running = asyncio.create_task(session.run())
        await joined.wait()
        ledger = Ledger(stub, session, SystemClock(), 1.0)
        publication = Publication(meta_of(BLOCK, NAMESPACE, 1), BLOCK.state, "writer", "save")
        saves, files = SteppedSaves(ledger, stop_loop), SteppedFiles(root, stop)
        ending = await publish(publication, saves, files, pool, 1.0)
        print(ending.value, flush=True)
        running.cancel()


if __name__ == "__main__":
    asyncio.run(_save_and_stop(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
