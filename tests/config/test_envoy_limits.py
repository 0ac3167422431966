"""Limits of Envoy that are too long or too large to wait for: the same configuration with smaller numbers."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx

from tests.config.conftest import serving
from tests.support.waiting import wait_for

CHAT = "/v1/chat/completions"


def _replaced(old: str, new: str, text: str) -> str:
    assert old in text
    return text.replace(old, new)


def test_a_silent_answer_is_504(tmp_path: Path) -> None:
    """An answer that stays silent beyond the idle timeout is 504 in OpenAI's shape, and the gateway is told."""

    def edit(text: str) -> str:
        return _replaced("idle_timeout: 600s", "idle_timeout: 0.3s", text)

    with serving(tmp_path, edit) as front:
        front.gateway.left.clear()
        response = front.http.post(CHAT, json={"do": "hang"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (504, "deadline_exceeded")
        assert error["type"] == "server_error"
        assert front.gateway.left.wait(5)


def test_too_many_requests_are_503(tmp_path: Path) -> None:
    """Beyond the circuit breaker a request is refused at once with Retry-After, and admitted when there is room."""

    def edit(text: str) -> str:
        return _replaced("max_requests: 1000", "max_requests: 2", text)

    with serving(tmp_path, edit) as front:
        with front.hold(), front.hold():
            wait_for(lambda: front.gateway.hanging == 2, "both are held")
            refused = front.http.post(CHAT, json={"do": "echo"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "service_unavailable"
            assert refused.headers["retry-after"] == "1"
        wait_for(lambda: front.http.get("/v1/models").status_code == 200, "there is room again")


def test_slow_headers_are_cut(tmp_path: Path) -> None:
    """A client that never finishes its headers is answered 408 in OpenAI's shape and put off."""

    def edit(text: str) -> str:
        return _replaced("request_headers_timeout: 10s", "request_headers_timeout: 0.3s", text)

    with (
        serving(tmp_path, edit) as front,
        socket.create_connection(("127.0.0.1", front.port)) as slow,
    ):
        slow.settimeout(10)
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        reply = b""
        while chunk := slow.recv(4096):
            reply += chunk
        assert reply.startswith(b"HTTP/1.1 408")
        assert b'"error"' in reply
        assert httpx.get(f"http://127.0.0.1:{front.port}/v1/models").status_code == 200
