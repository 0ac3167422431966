"""A light HTTP/1.1 client for streamed answers: the machine's two cores belong to the server that is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from bench.recording import Recording, data_events, head_and_body

READ_LIMIT = 1 << 20


class HttpError(RuntimeError):
    """The server answered with a status other than 200; the message holds the body."""


def _request(port: int, path: str, body: Mapping[str, object], headers: str = "") -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"{headers}Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


class Exchange:
    """One POST on a connection of its own. Leaving it closes the connection, which is how a client disconnects."""

    def __init__(self, port: int, path: str, body: Mapping[str, object]) -> None:
        self._port = port
        self._request = _request(port, path, body)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._port, limit=READ_LIMIT
        )
        self._writer.write(self._request)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Closes the connection now."""
        if self._writer is not None:
            self._writer.close()

    async def body(self) -> AsyncIterator[bytes]:
        """Yields the parts of a 200 answer as they come. Raises HttpError on another status."""
        reader = self._reader
        if reader is None:
            raise RuntimeError("not connected")
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        chunked = "transfer-encoding: chunked" in head
        parts = _chunks(reader) if chunked else _plain(reader, head)
        if status != 200:
            raise HttpError(f"{status}: {b''.join([p async for p in parts])[:500]!r}")
        async for part in parts:
            yield part

    async def events(self) -> AsyncIterator[bytes]:
        """Yields the payload of each SSE data event but the closing `[DONE]`."""
        pending = b""
        async for part in self.body():
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and b"[DONE]" not in line:
                    yield line[5:].strip()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield data[:-2]


async def _plain(reader: asyncio.StreamReader, head: str) -> AsyncIterator[bytes]:
    if "content-length:" in head:
        length = int(head.split("content-length:")[1].split("\r\n", maxsplit=1)[0])
        yield await reader.readexactly(length)
        return
    while data := await reader.read(READ_LIMIT):
        yield data


@dataclass(slots=True)
class Answer:
    """A streamed answer. Times are of time.perf_counter, in seconds; one per event that carried text."""

    sent: float
    times: list[float] = field(default_factory=list)
    finish: str | None = None
    completion_tokens: int | None = None

    @property
    def first_s(self) -> float:
        """From sending to the first text."""
        return self.times[0] - self.sent


async def stream(port: int, path: str, body: Mapping[str, object]) -> Answer:
    """Sends a streaming request of the OpenAI API and reads it to its end. Raises HttpError, EOFError, or RuntimeError on an error event."""
    answer = Answer(sent=time.perf_counter())
    loop = asyncio.get_running_loop()
    transport, recording = await loop.create_connection(Recording, "127.0.0.1", port)
    try:
        transport.write(_request(port, path, body, "Connection: close\r\n"))
        await recording.ended
    finally:
        transport.abort()
    head, parts = head_and_body(recording.parts)
    status = int(head.split(" ", 2)[1])
    if status != 200:
        raise HttpError(f"{status}: {b''.join(part.data for part in parts)[:500]!r}")
    for event in data_events(parts):
        read_event(answer, json.loads(event.data), event.at)
    return answer


def read_event(answer: Answer, event: dict[str, Any], now: float) -> None:
    """Adds one decoded event to the answer. Raises RuntimeError on an error event."""
    if "error" in event:
        raise RuntimeError(f"the stream failed: {event['error']}")
    for choice in event.get("choices") or []:
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            answer.times.append(now)
        if choice.get("finish_reason"):
            answer.finish = choice["finish_reason"]
    if event.get("usage"):
        answer.completion_tokens = event["usage"].get("completion_tokens")
