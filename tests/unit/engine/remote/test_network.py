"""Connections to providers, over loopback: what is gathered, what does not wait, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.engine.remote.network import HELD_BYTES_MAX, Stream, connect

LONG_S = 600.0
"""A gathering that no test waits for."""


class Peer:
    """The other side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, data: bytes) -> None:
        """Sends bytes."""
        self.writer.write(data)
        await self.writer.drain()


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Stream, Peer]]:
    """A connection and its other side."""
    came: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set_result(Peer(reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    stream = await connect("127.0.0.1", server.sockets[0].getsockname()[1])
    peer = await came
    try:
        yield stream, peer
    finally:
        stream.close()
        peer.writer.close()
        server.close()
        await server.wait_closed()


async def held(stream: Stream, size: int) -> None:
    """Waits until so many bytes have come and were not read."""
    async with asyncio.timeout(10):
        while len(stream._held) < size:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


async def test_what_comes_is_read_at_once_unless_it_is_gathered() -> None:
    """Then all that has come until a beat comes together."""
    async with linked() as (stream, peer):
        await peer.say(b"one")
        assert await stream.read() == b"one"
        stream.gather(0.2)
        reading = asyncio.ensure_future(stream.read())
        for part in (b"two", b"three", b"four"):
            await peer.say(part)
            await asyncio.sleep(0.001)
        assert await reading == b"twothreefour"
        loop = asyncio.get_running_loop()
        # At a beat, which all connections share.
        assert loop.time() % 0.2 < 0.15


async def test_beats_are_as_far_apart_as_was_asked() -> None:
    """However fast the bytes come."""
    async with linked() as (stream, peer):
        loop = asyncio.get_running_loop()
        stream.gather(0.05)
        times = []
        for _ in range(4):
            await peer.say(b"x")
            assert await stream.read() == b"x"
            times.append(loop.time())
        assert times[3] - times[0] >= 0.12


@pytest.mark.parametrize("ending", [b'"}\r\n\r\n0\r\n\r\n', None], ids=["last-chunk", "close"])
async def test_an_end_is_not_gathered(ending: bytes | None) -> None:
    """Of a body, or of the connection."""
    async with linked() as (stream, peer), asyncio.timeout(10):
        stream.gather(LONG_S)
        reading = asyncio.ensure_future(stream.read())
        await peer.say(b"some")
        await held(stream, 4)
        assert not reading.done()
        if ending is None:
            peer.writer.close()
        else:
            await peer.say(ending)
        assert (await reading).startswith(b"some")


async def test_a_gathering_has_an_end() -> None:
    """What comes then comes at once."""
    async with linked() as (stream, peer), asyncio.timeout(10):
        stream.gather(LONG_S)
        stream.gather(0)
        await peer.say(b"x")
        assert await stream.read() == b"x"


async def test_what_is_held_is_bounded() -> None:
    """A fast sender waits for its reader, and loses nothing."""
    sent = 64 * HELD_BYTES_MAX
    async with linked() as (stream, peer), asyncio.timeout(20):
        stream.gather(LONG_S)
        sending = asyncio.ensure_future(peer.say(b"x" * sent))
        await held(stream, HELD_BYTES_MAX)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(stream._held) < 8 * HELD_BYTES_MAX
        got = 0
        while got < sent - HELD_BYTES_MAX:
            part = await stream.read()
            assert HELD_BYTES_MAX <= len(part) < 8 * HELD_BYTES_MAX
            got += len(part)
        stream.gather(0)
        while got < sent:
            got += len(await stream.read())
        await sending


async def test_a_writer_waits_for_a_slow_reader() -> None:
    """And goes on when there is room."""
    sent = 32 << 20
    async with linked() as (stream, peer), asyncio.timeout(20):
        writing = asyncio.ensure_future(stream.write(b"x" * sent))
        await asyncio.sleep(0.01)
        assert not writing.done()
        got = 0
        while got < sent:
            got += len(await peer.reader.read(1 << 20))
        await writing


async def test_a_read_that_is_cancelled_loses_nothing() -> None:
    """The next one gets what has come."""
    async with linked() as (stream, peer), asyncio.timeout(10):
        reading = asyncio.ensure_future(stream.read())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await peer.say(b"x")
        assert await stream.read() == b"x"


async def test_a_close_is_seen_by_both_sides() -> None:
    """By a read and a write of this one too."""
    async with linked() as (stream, peer), asyncio.timeout(10):
        assert stream.is_quiet
        stream.close()
        assert await peer.reader.read() == b""
        assert await stream.read() == b""
        assert not stream.is_quiet
        with pytest.raises(ConnectionError):
            await stream.write(b"x")


async def test_an_unused_connection_that_the_server_closed_is_not_quiet() -> None:
    """Even before the loop has seen it."""
    async with linked() as (stream, peer):
        peer.writer.transport.abort()
        await asyncio.sleep(0)
        assert not stream.is_quiet


async def test_nobody_listens() -> None:
    """An OSError."""
    async with linked() as (_, peer):
        port = peer.writer.get_extra_info("sockname")[1]
    with pytest.raises(OSError, match="Connect"):
        await connect("127.0.0.1", port)
