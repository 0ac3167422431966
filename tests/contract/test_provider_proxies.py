"""Calls of providers through the proxy that the environment names."""

from __future__ import annotations

import asyncio
import base64

import pytest

from services.dev.provider.server import ScriptedProvider
from services.engine.remote.failure import Failure
from tests.support.forward_proxy import proxy
from tests.support.ports import free_port
from tests.support.provider_caller import caller

NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without proxies but those that a test names."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


async def test_plain_http_is_handed_on(environment: pytest.MonkeyPatch) -> None:
    """By one that wants a password too; connections to it are kept."""
    async with ScriptedProvider() as provider, proxy() as through:
        environment.setenv("HTTP_PROXY", f"http://me:p%40ss@127.0.0.1:{through.port}")
        async with caller(provider.base_url) as it:
            await it.call()
            await it.call()
        assert through.asked == [f"POST {provider.base_url}/chat/completions HTTP/1.1"]
        secret = base64.b64encode(b"me:p@ss").decode()
        assert through.authorizations == [f"Basic {secret}"]
        assert [len(received.headers) > 0 for received in provider.requests] == [True, True]


async def test_https_goes_through_a_tunnel(environment: pytest.MonkeyPatch) -> None:
    """In which the server proves who it is; this one cannot, and no credential is sent."""
    async with ScriptedProvider() as provider, proxy() as through:
        environment.setenv("HTTPS_PROXY", f"http://127.0.0.1:{through.port}")
        async with caller(provider.base_url.replace("http://", "https://")) as it:
            assert (await it.failure()).failure is Failure.NETWORK
        place = provider.base_url.split("/")[2]
        assert through.asked == [f"CONNECT {place} HTTP/1.1"]
        assert not through.authorizations


async def test_a_proxy_that_refuses(environment: pytest.MonkeyPatch) -> None:
    """The provider cannot be reached."""
    async with proxy(407) as through:
        environment.setenv("HTTPS_PROXY", f"127.0.0.1:{through.port}")
        async with caller("https://api.example.invalid/v1") as it:
            error = await it.failure()
        assert error.failure is Failure.NETWORK
        assert "407" in error.detail
        assert through.asked == ["CONNECT api.example.invalid:443 HTTP/1.1"]


async def test_exceptions_are_respected(environment: pytest.MonkeyPatch) -> None:
    """Servers of this machine are often such."""
    async with ScriptedProvider() as provider:
        environment.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
        async with caller(provider.base_url) as it:
            assert (await it.failure()).failure is Failure.NETWORK
        environment.setenv("NO_PROXY", "127.0.0.1")
        async with caller(provider.base_url) as it:
            await it.call()


def test_a_proxy_of_another_kind(environment: pytest.MonkeyPatch) -> None:
    """Nothing is sent past it."""
    environment.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")

    async def opened() -> None:
        async with caller("http://127.0.0.1:1/v1"):
            pass

    with pytest.raises(ValueError, match="proxy"):
        asyncio.run(opened())
