"""The connections to one server: kept for the next call, and made through proxies and with certificates as the environment names them.

Raises OSError, and h11.ProtocolError where a proxy speaks no HTTP.
"""

from __future__ import annotations

import base64
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from services.engine.remote.http1 import Connection
from services.engine.remote.network import Stream, connect
from services.runtime.clock import Clock

IDLE_S: Final = 90.0
"""How long a connection is kept that nobody uses."""
_PORTS: Final = {"http": 80, "https": 443}


class Connections:
    """All of an engine. `base_url` names the server; at most `kept` stay open while nobody uses them. The caller closes them."""

    def __init__(self, base_url: str, kept: int, clock: Clock) -> None:
        self._server = urlsplit(base_url)
        self._proxy = _proxy(self._server)
        self._kept = kept
        self._clock = clock
        self._idle: deque[Connection] = deque()
        """Those that were used last at the end."""
        self._context = (
            _context() if "https" in (self._server.scheme, self._scheme_of_proxy) else None
        )
        # The server, or a proxy that hands on what it is asked.
        self.prefix = ""
        """What a target begins with: nothing, but for a proxy that hands requests on."""
        self.headers: Mapping[str, str] = {}
        """What such a proxy wants to be told."""
        if self._proxy is not None and self._server.scheme == "http":
            self.prefix = f"http://{_name(self._server)}"
            self.headers = _authorization(self._proxy)

    async def take(self) -> Connection:
        """One that nobody uses, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.stream.is_quiet and not self._is_old(connection):
                return connection
            connection.stream.close()
        return Connection(await self._connect())

    def give_back(self, connection: Connection) -> None:
        """Its exchange is over, or given up: then it is closed, which the server sees."""
        if not connection.end():
            connection.stream.close()
            return
        connection.idle_since = self._clock.monotonic()
        self._idle.append(connection)
        while self._idle and (len(self._idle) > self._kept or self._is_old(self._idle[0])):
            self._idle.popleft().stream.close()

    def close(self) -> None:
        """Closes those that nobody uses."""
        while self._idle:
            self._idle.pop().stream.close()

    @property
    def _scheme_of_proxy(self) -> str:
        return self._proxy.scheme if self._proxy is not None else ""

    def _is_old(self, connection: Connection) -> bool:
        return self._clock.monotonic() - connection.idle_since > IDLE_S

    async def _connect(self) -> Stream:
        first = self._proxy or self._server
        stream = await connect(*_place(first))
        try:
            await self._secure(stream, first)
            if self._proxy is not None and self._server.scheme == "https":
                await _tunnel(stream, self._server, self._proxy)
                await self._secure(stream, self._server)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _secure(self, stream: Stream, server: SplitResult) -> None:
        if server.scheme == "https":
            assert self._context is not None
            await stream.start_tls(self._context, _place(server)[0])


def _context() -> ssl.SSLContext:
    context = httpx.create_ssl_context()  # Respects SSL_CERT_FILE and SSL_CERT_DIR.
    context.set_alpn_protocols(["http/1.1"])
    return context


def _proxy(server: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for a server (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY), unless NO_PROXY excepts it.

    Raises ValueError for one that is spoken to in another way than HTTP.
    """
    proxies = getproxies()
    told = proxies.get(server.scheme) or proxies.get("all")
    if not told or proxy_bypass(_name(server)):
        return None
    proxy = urlsplit(told if "://" in told else f"http://{told}")
    if proxy.scheme not in _PORTS or not proxy.hostname:
        raise ValueError("the proxy of the environment is none of http or https")
    return proxy


async def _tunnel(stream: Stream, server: SplitResult, proxy: SplitResult) -> None:
    """Lets a proxy connect to a server."""
    host, port = _place(server)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    head = await Connection(stream).send(
        "CONNECT", target, {"host": target, **_authorization(proxy)}
    )
    if not 200 <= head.status < 300:
        raise ConnectionError(f"the proxy says {head.status}")


def _authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"proxy-authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _place(url: SplitResult) -> tuple[str, int]:
    return url.hostname or "", url.port or _PORTS[url.scheme]


def _name(url: SplitResult) -> str:
    """Host and port, as they stand in the URL."""
    return url.netloc.rpartition("@")[2]
