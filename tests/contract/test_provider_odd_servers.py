"""The HTTP client with servers that the scripted provider is not: TLS, compression, whole answers, and what is no answer."""

from __future__ import annotations

import asyncio
import gzip
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from caravan.core.v1 import generation_pb2

from services.engine.remote.failure import Failure
from tests.support.forward_proxy import proxy
from tests.support.provider_caller import caller

STOP = generation_pb2.FINISH_REASON_STOP
PIECE = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
ANSWER = PIECE + LAST
WHOLE = b'{"choices":[{"index":0,"message":{"content":"Hi"},"finish_reason":"stop"}]}'


class Server:
    """Answers each request on a connection with the next of `answers`, and then closes it, unless it `stays`."""

    def __init__(self, answers: tuple[bytes, ...], *, stays: bool) -> None:
        self.answers = answers
        self.stays = stays
        self.url = ""
        self.connections = 0
        self.requests = 0
        self.protocols: set[str | None] = set()
        self.left = asyncio.Event()
        """Set when a client has closed a connection."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        secured = writer.get_extra_info("ssl_object")
        self.protocols.add(secured.selected_alpn_protocol() if secured else None)
        try:
            for answer in self.answers:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                writer.write(answer)
            await writer.drain()
            while self.stays and await reader.read(65536):
                pass
            self.left.set()
        except (OSError, asyncio.IncompleteReadError):
            self.left.set()
        finally:
            writer.close()


@asynccontextmanager
async def saying(
    *answers: bytes, stays: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    """A server on loopback."""
    served = Server(answers, stays=stays)
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0, ssl=tls)
    scheme = "https" if tls else "http"
    served.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield served
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    """A server's TLS that offers HTTP/2 too; `tmp_path`/certificate.pem says who it is."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    made, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    command = [openssl, *options.split(), "-keyout", str(key), "-out", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


async def test_a_cancelled_call_is_seen_over_tls_too(
    tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by servers that offer HTTP/2, where it would not be."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    begun = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + PIECE
    async with saying(begun, stays=True, tls=tls) as server, caller(server.url) as it:
        task = asyncio.ensure_future(it.call())
        await asyncio.wait_for(it.heard.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.left.wait(), 10)
        assert server.protocols == {"http/1.1"}


@pytest.mark.parametrize("tunnelled", [False, True])
async def test_connections_over_tls_are_kept(
    tls: ssl.SSLContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, tunnelled: bool
) -> None:
    """Straight or through the tunnel of a proxy."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    answers = (plain("200 OK", ANSWER, content_type="text/event-stream"),) * 3
    async with saying(*answers, stays=True, tls=tls) as server, proxy() as through:
        if tunnelled:
            monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{through.port}")
        async with caller(server.url) as it:
            for _ in answers:
                assert (await it.call()).reason == STOP
        assert (server.requests, server.connections) == (3, 1)
        assert len(through.asked) == tunnelled


async def test_a_certificate_that_nobody_trusts(tls: ssl.SSLContext) -> None:
    """No credential is sent there."""
    async with saying(plain("200 OK", WHOLE), tls=tls) as server, caller(server.url) as it:
        error = await it.failure()
        assert error.failure is Failure.NETWORK
        assert "certificate" in error.detail
        assert server.requests == 0


def plain(status: str, body: bytes, **headers: str) -> bytes:
    """An answer of HTTP/1.1 with its length."""
    named = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status}\r\n{named}content-length: {len(body)}\r\n\r\n"
    return head.encode("latin-1") + body


async def test_compression_that_was_not_asked_for() -> None:
    """Some proxies cannot be talked out of it."""
    packed = gzip.compress(ANSWER)
    answer = plain("200 OK", packed, content_type="text/event-stream", content_encoding="gzip")
    async with saying(answer) as server, caller(server.url) as it:
        assert (await it.call()).reason == STOP
        assert it.text == "Hi"
    broken = plain("200 OK", b"\x00", content_type="text/event-stream", content_encoding="gzip")
    async with saying(broken) as server, caller(server.url) as it:
        assert (await it.failure()).failure is Failure.NETWORK


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", ""])
async def test_a_whole_answer_instead_of_a_stream(kind: str) -> None:
    """It is one piece."""
    async with (
        saying(plain("200 OK", WHOLE, content_type=kind)) as server,
        caller(server.url) as it,
    ):
        assert (await it.call()).reason == STOP
        assert (it.text, it.batches) == ("Hi", 1)


@pytest.mark.parametrize("body", [b"", b"  ", b"\xff", b"<html>", b"null", b"[]", b'{"ok":true}'])
async def test_other_bodies_are_no_answers(body: bytes) -> None:
    """Whatever the status says. JSON could have been the beginning of one."""
    async with (
        saying(plain("200 OK", body, content_type="text/html")) as server,
        caller(server.url) as it,
    ):
        expected = Failure.NETWORK if body.startswith(b"{") else Failure.SERVER_ERROR
        assert (await it.failure()).failure is expected


@pytest.mark.parametrize("status", ["500 Oh", "200 OK"])
async def test_a_body_that_is_too_long_is_not_read_to_its_end(status: str) -> None:
    """Neither of an error nor of an answer. The rest of this one never comes."""
    endless = plain(status, b'{"error":{"message":"x"}}' + b" " * 9_000_000)[:-1]
    async with saying(endless, stays=True) as server, caller(server.url) as it:
        error = await asyncio.wait_for(it.failure(), 10)
        assert error.metadata == {"status": status[:3]}


async def test_what_is_no_http() -> None:
    """Another service listens there."""
    async with saying(b"SSH-2.0-OpenSSH_9.9\r\n\r\n") as server, caller(server.url) as it:
        assert (await it.failure()).failure is Failure.NETWORK


@pytest.mark.parametrize(
    ("status", "told", "kept"),
    [
        ("500 Oops", {"x_request_id": "req_7"}, "req_7"),
        ("200 OK", {"request_id": "req_8", "content_type": "text/event-stream"}, "req_8"),
        ("500 Oops", {"request_id": "r" * 500}, "r" * 128),
        ("500 Oops", {"x_request_id": "\u009b2J"}, ""),
        ("500 Oops", {}, ""),
    ],
    ids=["refusal", "no answer", "long", "of a terminal", "none"],
)
async def test_a_failure_bears_the_providers_request_id(
    status: str, told: dict[str, str], kept: str
) -> None:
    """Its support asks for it. It is of somebody else, and ends up in logs."""
    answer = plain(status, b"data: {nonsense\n\n", **told)
    async with saying(answer) as server, caller(server.url) as it:
        assert (await it.failure()).provider_request_id == kept


async def test_a_redirect_is_not_followed() -> None:
    """The credential goes to the address that the deployment names, and to no other."""
    answer = plain("307 Temporary Redirect", b"", location="http://127.0.0.1:1/v1")
    async with saying(answer) as server, caller(server.url) as it:
        assert (await it.failure()).failure is Failure.NOT_FOUND


async def test_an_explanation_that_does_not_come() -> None:
    """The status counts all the same."""
    answer = b"HTTP/1.1 429 Slow\r\nretry-after: 3\r\ncontent-length: 50\r\n\r\nhalf"
    async with saying(answer) as server, caller(server.url) as it:
        error = await it.failure()
    assert (error.failure, error.retry_after_s) == (Failure.RATE_LIMITED, 3)


async def test_an_idle_connection_that_was_closed_is_not_used() -> None:
    """The server closes it after its answer; the next call makes a new one."""
    answer = plain("200 OK", ANSWER, content_type="text/event-stream")
    async with saying(answer) as server, caller(server.url) as it:
        for _ in range(3):
            assert (await it.call()).reason == STOP
