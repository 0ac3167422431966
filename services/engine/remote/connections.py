"""The pool of connections to one provider: proxies and certificates as the environment names them."""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore
import httpx

from services.engine.remote.network import Network

IDLE_S: Final = 90.0
"""How long a connection is kept that nobody uses."""


def open_pool(base_url: str, kept: int) -> httpcore.AsyncConnectionPool:
    """Connections to the server of a URL, of which at most `kept` stay open while nobody uses them. The caller closes it."""
    parts = urlsplit(base_url)
    return httpcore.AsyncConnectionPool(
        ssl_context=httpx.create_ssl_context(),  # Respects SSL_CERT_FILE and SSL_CERT_DIR.
        proxy=_proxy(parts.scheme, parts.netloc.rpartition("@")[2]),
        max_connections=None,
        max_keepalive_connections=kept,
        keepalive_expiry=IDLE_S,
        network_backend=Network(),
    )


def _proxy(scheme: str, server: str) -> httpcore.Proxy | None:
    """The proxy that the environment names for a server (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY), unless NO_PROXY excepts it."""
    proxies = getproxies()
    told = proxies.get(scheme) or proxies.get("all")
    if not told or proxy_bypass(server):
        return None
    parts = urlsplit(told if "://" in told else f"http://{told}")
    port = f":{parts.port}" if parts.port else ""
    auth = None
    if parts.username is not None:
        auth = (unquote(parts.username), unquote(parts.password or ""))
    return httpcore.Proxy(f"{parts.scheme}://{parts.hostname}{port}", auth=auth)
