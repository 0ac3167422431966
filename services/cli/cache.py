"""`caravan cache`: looks into the cache service, drops blocks, checks their files."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import grpc
from caravan.cache.v1 import cache_service_pb2 as pb
from caravan.cache.v1 import cache_service_pb2_grpc as pb_grpc

from services.cli.cache_tables import row_object, rows_text, stats_text
from services.cli.state_dir import StateDirError, address_of
from services.cli.tables import size
from services.runtime.channel import open_channel

OK: Final = 0
FAILED: Final = 1
WRONG_USE: Final = 2
_TIMEOUT_S: Final = 30.0


class CacheCommandError(Exception):
    """The command cannot do what was asked; the message is for the user, `code` the exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Listing:
    """What to list: keys that begin with `prefix`, `limit` of them at most (0: all), as JSON lines or as a table."""

    prefix: str = ""
    limit: int = 0
    as_json: bool = False


@dataclass(frozen=True)
class Dropping:
    """What to drop, one of three: `free_bytes` of what is least worth keeping, all that nobody uses, or blocks by key."""

    free_bytes: int = 0
    everything: bool = False
    keys: tuple[str, ...] = ()


class CacheCommands:
    """The commands that ask the service. `now_s` is in seconds since the Unix epoch."""

    def __init__(self, stub: pb_grpc.CacheServiceAsyncStub, out: TextIO, now_s: float) -> None:
        self._stub = stub
        self._out = out
        self._now_s = now_s

    async def stats(self) -> None:
        """Prints sizes and counters."""
        found = await self._stub.GetStats(pb.GetStatsRequest(), timeout=_TIMEOUT_S)
        self._say(stats_text(found))

    async def ls(self, listing: Listing) -> None:
        """Prints the blocks."""
        rows = [row async for row in self._rows(listing.prefix, listing.limit)]
        if listing.as_json:
            for row in rows:
                self._say(json.dumps(row_object(row)))
        elif rows:
            for line in rows_text(rows, self._now_s):
                self._say(line)
        else:
            self._say("no blocks")

    async def evict(self, dropping: Dropping) -> None:
        """Drops blocks; those in use stay. Raises CacheCommandError for a key that is not there."""
        dropped: pb.CollectResponse | pb.EvictResponse
        if dropping.everything:
            dropped = await self._stub.Collect(pb.CollectRequest(), timeout=_TIMEOUT_S)
        else:
            keys = [await self._whole_key(prefix) for prefix in dropping.keys]
            request = pb.EvictRequest(bytes=dropping.free_bytes, keys=keys)
            dropped = await self._stub.Evict(request, timeout=_TIMEOUT_S)
        copies = "1 copy" if dropped.copies == 1 else f"{dropped.copies} copies"
        self._say(f"{copies} dropped, {size(dropped.bytes)}")

    async def _whole_key(self, prefix: str) -> bytes:
        """The key of the only block that begins so."""
        keys = [row.block.key async for row in self._rows(prefix, 2)]
        if not keys:
            raise CacheCommandError(f"no block has a key that begins with {prefix}")
        if len(keys) > 1:
            raise CacheCommandError(f"more than one key begins with {prefix}", WRONG_USE)
        return keys[0]

    async def _rows(self, prefix: str, limit: int) -> AsyncIterator[pb.DumpResponse]:
        # The service compares whole bytes; half a byte more is compared here.
        whole = bytes.fromhex(prefix[: len(prefix) // 2 * 2])
        odd = len(prefix) % 2 == 1
        request = pb.DumpRequest(key_prefix=whole, limit=0 if odd else limit)
        call = self._stub.Dump(request, timeout=_TIMEOUT_S)
        shown = 0
        try:
            async for row in call:
                if row.block.key.hex().startswith(prefix):
                    yield row
                    shown += 1
                    if shown == limit:
                        return
        finally:
            call.cancel()

    def _say(self, text: str) -> None:
        self._out.write(text + "\n")


@asynccontextmanager
async def connected(address: str, out: TextIO, now_s: float) -> AsyncIterator[CacheCommands]:
    """The commands for the service at an address. Raises CacheCommandError where it does not answer."""
    async with open_channel(address) as channel:
        try:
            yield CacheCommands(pb_grpc.CacheServiceStub(channel), out, now_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                raise CacheCommandError(f"no cache service answers at {address}") from error
            raise CacheCommandError(error.details() or error.code().name) from error


def ask(
    address: str | None,
    state_dir: Path,
    asked: Listing | Dropping | None,
    out: TextIO,
    now_s: float,
) -> None:
    """Runs stats (None), ls or evict. Raises CacheCommandError."""
    try:
        where = address or address_of(state_dir, "cache")
    except StateDirError as error:
        raise CacheCommandError(str(error)) from error

    async def run() -> None:
        async with connected(where, out, now_s) as commands:
            if asked is None:
                await commands.stats()
            elif isinstance(asked, Listing):
                await commands.ls(asked)
            else:
                await commands.evict(asked)

    asyncio.run(run())


def verify(folders: Sequence[Path]) -> int:
    """Checks every block file of the folders, in a process of the engine, whose format it is; returns its exit code."""
    # -P: a folder called `services` where the user happens to be must not be imported.
    argv = (sys.executable, "-P", "-m", "services.engine.kv.verify", *map(str, folders))
    return subprocess.run(argv, check=False).returncode
