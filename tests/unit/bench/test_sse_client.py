"""The light HTTP client reads what servers really send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from bench.sse_client import Answer, Exchange, HttpError, read_event, stream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server that reads one request and lets `handler` answer it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n", maxsplit=1)[0])
        await reader.readexactly(length)
        await handler(reader, writer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def content(text: str) -> bytes:
    """One chunk event."""
    event = {"choices": [{"delta": {"content": text}, "finish_reason": None}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


ENDING = (
    b'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'
)


async def test_events_may_be_cut_anywhere() -> None:
    """HTTP chunks and SSE events have nothing to do with each other."""
    wire = b": keepalive\n\n" + content("a") + content("b") + ENDING

    async def handler(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for start in range(0, len(wire), 7):
            part = wire[start : start + 7]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        writer.write(b"0\r\n\r\n")

    async with serving(handler) as port:
        answer = await stream(port, "/v1/chat/completions", {})
    assert (len(answer.times), answer.finish, answer.completion_tokens) == (2, "length", 2)


async def test_an_answer_may_end_with_its_connection() -> None:
    """Servers that neither chunk nor give a length end the body by closing."""

    async def handler(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"\r\n" + content("a") + ENDING)

    async with serving(handler) as port:
        answer = await stream(port, "/v1/chat/completions", {})
    assert (len(answer.times), answer.finish) == (1, "length")


async def test_a_refusal_is_an_error_with_its_body() -> None:
    """A bench must not count a refused request as a fast one."""

    async def handler(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy")

    async with serving(handler) as port:
        with pytest.raises(HttpError, match=r"429.*busy"):
            await stream(port, "/v1/chat/completions", {})


def test_an_error_event_is_an_error() -> None:
    """A stream that fails half-way is not an answer."""
    with pytest.raises(RuntimeError, match="broken"):
        read_event(Answer(sent=0.0), {"error": {"message": "broken"}}, 1.0)


async def test_leaving_closes_the_connection() -> None:
    """The server sees the end of the connection as soon as the client leaves."""
    seen = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        assert await reader.read(1) == b""
        seen.set()

    async with serving(handler) as port:
        async with Exchange(port, "/v1/chat/completions", {}):
            pass
        async with asyncio.timeout(5):
            await seen.wait()
