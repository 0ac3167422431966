"""What Envoy makes of REST requests, by the real binary and our configuration."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from services.runtime.errors import TABLE
from tests.config.conftest import Front
from tests.support.waiting import wait_for

CHAT = "/v1/chat/completions"


def _post(front: Front, **script: Any) -> httpx.Response:
    return front.http.post(CHAT, json=script)


def _error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return dict(error)


def test_bodies_pass_byte_for_byte(front: Front) -> None:
    """The transcoder neither parses nor reformats a body; the gateway's request id reaches the client."""
    body = b'{"b": 1, "a": 12345678901234567890, "do": "echo", "x": "\xc3\xbc" }'
    response = front.http.post(CHAT, content=body, headers={"x-request-id": "mine"})
    assert response.status_code == 200
    assert response.json()["text"] == body.decode()
    assert response.headers["x-request-id"] == "req-stand-in"
    assert response.json()["metadata"]["x-request-id"] == "mine"
    assert not [name for name in response.headers if name.startswith("grpc-")]


def test_streams_pass_event_by_event(front: Front) -> None:
    """The first event arrives while the gateway still holds back the second."""
    front.gateway.release.clear()
    script = {"do": "stream", "count": 3, "hold": True}
    with front.http.stream("POST", CHAT, json=script) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        chunks = response.iter_raw()
        assert next(chunks) == b"data: 0\n\n"
        front.gateway.release.set()
        assert b"".join(chunks) == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("kind", ["stream", "unary"])
@pytest.mark.parametrize("reason", TABLE)
def test_errors_of_the_table_arrive_exactly(front: Front, reason: str, kind: str) -> None:
    """Each reason has the HTTP status and OpenAI fields of its row, whatever is in the message (I10)."""
    if kind == "stream":
        response = _post(front, do="error", reason=reason)
    else:
        response = front.http.get(f"/v1/models/error-{reason}")
    row = TABLE[reason]
    assert response.status_code == row.http_status
    assert _error(response) == {
        "message": 'bad "x" ünï\nline',
        "type": row.openai_type,
        "param": "messages[0]",
        "code": row.openai_code,
    }
    assert not [name for name in response.headers if name.startswith(("grpc-", "x-openai"))]


def test_bare_statuses_of_unary_calls(front: Front) -> None:
    """So does that of a unary call; what is escaped in it stays escaped once."""
    response = front.http.get("/v1/models/bare-INTERNAL")
    assert response.status_code == 500
    assert _error(response)["message"] == 'bare "ünï"\nhere %41'


def test_retry_time_becomes_a_header(front: Front) -> None:
    """A retry time arrives as Retry-After."""
    response = _post(front, do="error", reason="CAPACITY_EXHAUSTED", retry=6.2)
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("INVALID_ARGUMENT", 400, "invalid_request_error"),
        ("RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
        ("UNAVAILABLE", 503, "server_error"),
        ("INTERNAL", 500, "server_error"),
    ],
)
def test_bare_statuses_get_the_shape_too(front: Front, code: str, status: int, kind: str) -> None:
    """A gRPC status without our metadata still becomes OpenAI's error JSON."""
    response = _post(front, do="bare", code=code)
    assert response.status_code == status
    assert _error(response) == {
        "message": 'bare "words"\nhere',
        "type": kind,
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v2/models", "/v1/embeddings", "/caravan.x"])
def test_unknown_urls_are_404(front: Front, path: str) -> None:
    """A URL that is none is answered by Envoy, in OpenAI's shape."""
    response = front.http.get(path)
    assert response.status_code == 404
    assert _error(response)["code"] == "unknown_url"
    assert path in _error(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST, OPTIONS"),
        ("DELETE", "/v1/completions", "POST, OPTIONS"),
        ("PUT", CHAT, "POST, OPTIONS"),
        ("PATCH", CHAT, "POST, OPTIONS"),
        ("POST", "/v1/models", "GET, OPTIONS"),
        ("DELETE", "/v1/models/org/name:1", "GET, OPTIONS"),
    ],
)
def test_wrong_methods_are_405(front: Front, method: str, path: str, allow: str) -> None:
    """Another method on a URL that exists is 405 and says what is allowed (RFC 9110, 15.5.6)."""
    response = front.http.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allow)
    assert _error(response)["code"] == "method_not_allowed"


def test_head_is_405_without_a_body(front: Front) -> None:
    """HEAD is answered without a body, and the connection stays usable."""
    response = front.http.head("/v1/models")
    assert (response.status_code, response.content) == (405, b"")
    assert front.http.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("path", "allow"), [(CHAT, "POST, OPTIONS"), ("/v1/models", "GET, OPTIONS")]
)
def test_plain_options_tell_the_methods(front: Front, path: str, allow: str) -> None:
    """OPTIONS without a preflight's headers is answered."""
    response = front.http.options(path)
    assert (response.status_code, response.headers["allow"]) == (204, allow)


def test_model_names_may_have_slashes(front: Front) -> None:
    """Names with slashes and colons arrive whole, escaped or not, whatever the query says."""
    for path in ("/v1/models/org/name:1", "/v1/models/org%2Fname%3A1", "/v1/models/org/name:1?x=y"):
        assert front.http.get(path).json() == {"id": "org/name:1"}


@pytest.mark.parametrize("size", [10_000_000, 33_554_432])
def test_large_bodies_pass(front: Front, size: int) -> None:
    """Bodies up to 32 MiB reach the gateway."""
    response = front.http.post(CHAT, content=b"x" * size)
    assert response.json()["bytes"] == size


@pytest.mark.parametrize("chunked", [False, True])
def test_larger_bodies_are_413(front: Front, chunked: bool) -> None:
    """A byte more is refused, by its announced length or by counting."""
    size = 33_554_433 if not chunked else 34_000_000
    content = (b"x" * 1_000_000 for _ in range(34)) if chunked else b"x" * size
    response = front.http.post(CHAT, content=content)
    assert response.status_code == 413
    assert _error(response)["code"] == "request_too_large"


def test_a_break_after_the_first_byte_keeps_what_came(front: Front) -> None:
    """An error after the first event does not turn what was sent into something else."""
    with front.http.stream("POST", CHAT, json={"do": "break"}) as response:
        assert response.status_code == 200
        assert b"".join(response.iter_raw()) == b"data: 1\n\n"


def test_a_client_that_leaves_is_noticed(front: Front) -> None:
    """Closing the connection before the first byte cancels the call at the gateway (I5)."""
    front.gateway.left.clear()
    before = front.gateway.hanging
    with front.hold():
        wait_for(lambda: front.gateway.hanging > before, "the call has arrived")
        assert not front.gateway.left.is_set()
    assert front.gateway.left.wait(10)


def test_access_log_is_json(front: Front) -> None:
    """Each request is a line of JSON with the client's URL; health checks leave none."""
    front.http.get("/v1/models?marker=1")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in front.access_log.read_text().splitlines()]

    wait_for(
        lambda: [line for line in lines() if line["path"] == "/v1/models?marker=1"], "the line"
    )
    line = next(line for line in lines() if line["path"] == "/v1/models?marker=1")
    assert (line["method"], line["status"]) == ("GET", 200)
    assert isinstance(line["duration_ms"], int)
    assert not [line for line in lines() if line["path"] == "/healthz"]


def test_admin_cannot_be_told_to_quit(front: Front) -> None:
    """A request that a web page can trigger neither ends Envoy nor shows its configuration."""
    with httpx.Client(base_url=f"http://127.0.0.1:{front.admin}") as admin:
        assert admin.post("/quitquitquit").status_code == 403
        assert admin.get("/config_dump").status_code == 403
        assert "envoy_server_live" in admin.get("/stats/prometheus").text


def test_histograms_are_gathered_when_they_are_asked_for(front: Front) -> None:
    """No timer gathers them; a look asks for it, and shows it or leaves it to the next one."""
    assert front.http.get("/v1/models").status_code == 200
    name = r"^http\.public\.downstream_rq_time$"
    with httpx.Client(base_url=f"http://127.0.0.1:{front.admin}") as admin:
        wait_for(
            lambda: "P99(" in admin.get(f"/stats?filter={name}&histogram_buckets=none").text,
            "the durations are gathered",
        )
