"""Blocks from another engine: the client of FetchBlocks, and the reading side of its server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from caravan.engine.v1 import engine_service_pb2 as pb
from caravan.engine.v1 import engine_service_pb2_grpc as pb_grpc

from services.engine.kv import kvc
from services.engine.kv.block_file import LoadedBlock
from services.engine.kv.blocking import RunBlocking
from services.engine.kv.checksum import crc32c
from services.engine.kv.holdings import Holdings
from services.engine.kv.keys import KEY_BYTES, Namespace
from services.engine.kv.kvc import Expected, Flaw, Head, KvcError
from services.engine.kv.rows import meta_of
from services.engine.kv.store import SavedBlock
from services.runtime.channel import open_channel
from services.runtime.clock import Clock
from services.runtime.errors import CaravanError

PIECE_BYTES: Final = 1 << 20
"""Most bytes of one message."""
BLOCK_BYTES_MAX: Final = 1 << 30
"""Most bytes of a block that is taken from another engine: what its header says is not yet proven when memory is reserved."""
KEYS_MAX: Final = 65_536


# --- client ----------------------------------------------------------------------------------------------------------


class _Incoming:
    """One block on its way: checked as it comes, in a buffer of its final size."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._first = bytearray()
        self._head: Head | None = None
        self._payload = memoryview(b"")
        self._at = 0
        self._crc = 0

    def feed(self, data: bytes, *, last: bool) -> None:
        """Takes the next bytes. Raises KvcError."""
        if self._head is None:
            self._first += data
            if len(self._first) < kvc.PREFIX_BYTES_MAX and not last:
                return
            data = self._begin(bytes(self._first))
        if self._at + len(data) > len(self._payload):
            raise KvcError(Flaw.TRAILING_BYTES)
        self._payload[self._at : self._at + len(data)] = data
        self._crc = crc32c(data, self._crc)
        self._at += len(data)

    def _begin(self, first: bytes) -> bytes:
        """Parses the prefix; returns what followed it."""
        head = kvc.parse(first)
        self._expected.check(head.meta)
        if head.payload_bytes > BLOCK_BYTES_MAX:
            raise KvcError(Flaw.MALFORMED, f"{head.payload_bytes} bytes")
        self._payload = np.empty(head.payload_bytes, dtype=np.uint8).data
        self._head = head
        return first[head.payload_offset :]

    def finish(self) -> LoadedBlock:
        """The block, once all of it is here. Raises KvcError."""
        if self._head is None or self._at < len(self._payload):
            raise KvcError(Flaw.TRUNCATED)
        kvc.check_payload(self._head, self._crc)
        return LoadedBlock(self._head.meta, self._payload.toreadonly(), self._head.file_bytes)


async def fetch_blocks(
    address: str, wanted: Sequence[Expected]
) -> AsyncGenerator[LoadedBlock, None]:
    """Blocks of the engine at `address`, in order, each checked; ends early where one is missing.

    Raises grpc.aio.AioRpcError, KvcError. The caller bounds the time, and closes the iterator to end the call.
    """
    async with open_channel(address) as channel:
        stub: pb_grpc.EngineServiceAsyncStub = pb_grpc.EngineServiceStub(channel)
        call = stub.FetchBlocks(pb.FetchBlocksRequest(keys=[one.key for one in wanted]))
        try:
            left = iter(wanted)
            incoming: _Incoming | None = None
            async for piece in call:
                if piece.missing:
                    return
                if incoming is None:
                    incoming = _Incoming(next(left))
                incoming.feed(piece.data, last=piece.last)
                if piece.last:
                    yield incoming.finish()
                    incoming = None
        finally:
            call.cancel()


# --- server ----------------------------------------------------------------------------------------------------------


class BlockServer:
    """Reads blocks for other engines. They are not checked here: the receiver must check them anyway."""

    def __init__(
        self, holdings: Holdings, namespace: Namespace, blocking: RunBlocking, clock: Clock
    ) -> None:
        self._holdings = holdings
        self._namespace = namespace
        self._blocking = blocking
        self._clock = clock

    async def serve(self, keys: Sequence[bytes]) -> AsyncIterator[pb.FetchBlocksResponse]:
        """The blocks in the order asked for, in pieces. Raises CaravanError: INVALID_VALUE."""
        if len(keys) > KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
            raise CaravanError(
                "INVALID_VALUE", f"At most {KEYS_MAX} keys of {KEY_BYTES} bytes each.", param="keys"
            )
        for key in keys:
            pieces = self._pieces(key)
            piece = await self._blocking(lambda pieces=pieces: next(pieces, None))  # type: ignore[misc]
            if piece is None:
                yield pb.FetchBlocksResponse(key=key, missing=True)
            while piece is not None:
                following = await self._blocking(lambda pieces=pieces: next(pieces, None))  # type: ignore[misc]
                yield pb.FetchBlocksResponse(key=key, data=piece, last=following is None)
                piece = following

    def _pieces(self, key: bytes) -> Iterator[bytes]:
        """A block's file in pieces; none where it is not here. Blocking."""
        block = self._holdings.ram.get(key)
        if block is not None:
            yield from self._memory_pieces(block)
            return
        for mounted in self._holdings.roots.values():
            try:
                yield from _file_pieces(mounted.root.file_of(key))
            except FileNotFoundError:
                continue
            return

    def _memory_pieces(self, block: SavedBlock) -> Iterator[bytes]:
        meta = meta_of(block, self._namespace, self._clock.wall())
        yield kvc.seal(meta, block.state)
        for at in range(0, len(block.state), PIECE_BYTES):
            yield bytes(block.state[at : at + PIECE_BYTES])


def _file_pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
