"""A proxy as companies have them between their machines and the network, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Proxy:
    """Hands on what it is asked, by tunnels and otherwise, to servers of this machine."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.port = 0
        self.asked: list[str] = []
        """First lines of requests."""
        self.authorizations: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: its first request says where to."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        line = head.partition("\r\n")[0]
        self.asked.append(line)
        self.authorizations += [
            field.partition(": ")[2]
            for field in head.split("\r\n")
            if field.lower().startswith("proxy-authorization")
        ]
        method, target, _ = line.split()
        if self.status != 200:
            writer.write(f"HTTP/1.1 {self.status} No\r\ncontent-length: 0\r\n\r\n".encode())
            writer.close()
            return
        place = target if method == "CONNECT" else target.split("/")[2]
        host, _, port = place.rpartition(":")
        there, onward = await asyncio.open_connection(host, int(port))
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            onward.write(head.replace(f"http://{place}", "", 1).encode())
        await asyncio.gather(_copy(reader, onward), _copy(there, writer))


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(65536):
            sink.write(data)
    finally:
        sink.close()


@asynccontextmanager
async def proxy(status: int = 200) -> AsyncIterator[Proxy]:
    """A proxy on loopback."""
    served = Proxy(status)
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        await server.wait_closed()
