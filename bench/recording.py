"""Records what a server sends, and when, and reads it afterwards: the cores belong to the server while it is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes as one read gave them, and when in seconds of time.perf_counter."""

    at: float
    data: bytes


class Recording(asyncio.Protocol):
    """One HTTP/1.1 answer on a connection that the server closes after it."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. All that is done while the server works."""
        self.parts.append(Part(time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self.ended.done():
            if exc is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(exc)


def head_and_body(parts: list[Part]) -> tuple[str, list[Part]]:
    """The head in lower case, and the parts of the body without chunk sizes. Raises EOFError where the answer was cut."""
    raw = b"".join(part.data for part in parts)
    end = raw.find(b"\r\n\r\n")
    if end < 0:
        raise EOFError("the answer has no head")
    head = raw[:end].decode("latin-1").lower()
    times = _Times(parts)
    if "transfer-encoding: chunked" in head:
        return head, [Part(times.of(last), raw[a:last]) for a, last in _chunks(raw, end + 4)]
    return head, [Part(times.of(len(raw)), raw[end + 4 :])] if len(raw) > end + 4 else []


class _Times:
    """When the answer had come up to a byte; asked with growing positions."""

    def __init__(self, parts: list[Part]) -> None:
        self._parts = iter(parts)
        self._received = 0
        self._at = 0.0

    def of(self, position: int) -> float:
        while self._received < position:
            part = next(self._parts)
            self._received += len(part.data)
            self._at = part.at
        return self._at


def _chunks(raw: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Where the data of each chunk begins and ends."""
    while True:
        line_end = raw.find(b"\r\n", start)
        if line_end < 0:
            raise EOFError("the answer was cut")
        size = int(raw[start:line_end].split(b";")[0], 16)
        begin, end = line_end + 2, line_end + 2 + size
        if size == 0:
            return
        if end > len(raw):
            raise EOFError("the answer was cut")
        yield begin, end
        start = end + 2


def data_events(parts: list[Part]) -> Iterator[Part]:
    """The payload of each server-sent data event but the closing `[DONE]`, with the time of its last byte."""
    pending = b""
    for part in parts:
        *lines, pending = (pending + part.data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                yield Part(part.at, line[5:].strip())
