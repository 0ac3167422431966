"""What answers other than 200 mean (S3.19, S3.20, W29)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.engine.remote.failure import CIRCUIT_FAILURES, RETRYABLE, Failure, ProviderError
from services.engine.remote.provider import Provider
from tests.support.wires import SECRET, wire_of

OPENAI, ANTHROPIC, GEMINI = Provider.OPENAI, Provider.ANTHROPIC, Provider.GEMINI


def error(provider: Provider, status: int, document: Any = None, **headers: str) -> ProviderError:
    """The error that a body means; names of headers with underscores."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return wire_of(provider).error(status, named, json.dumps(document).encode())


@pytest.mark.parametrize("provider", list(Provider), ids=lambda provider: provider.value)
@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (204, Failure.SERVER_ERROR),
        (307, Failure.NOT_FOUND),
        (400, Failure.REJECTED),
        (401, Failure.UNAUTHORIZED),
        (402, Failure.FORBIDDEN),
        (403, Failure.FORBIDDEN),
        (404, Failure.NOT_FOUND),
        (408, Failure.SERVER_ERROR),
        (409, Failure.SERVER_ERROR),
        (413, Failure.REJECTED),
        (422, Failure.REJECTED),
        (429, Failure.RATE_LIMITED),
        (500, Failure.SERVER_ERROR),
        (503, Failure.SERVER_ERROR),
        (529, Failure.SERVER_ERROR),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html>Bad</html>", b"{}", b'{"error": 7}', b"\xff", b"["])
def test_statuses_alone(provider: Provider, status: int, failure: Failure, body: bytes) -> None:
    """A body that explains nothing changes nothing."""
    found = wire_of(provider).error(status, {}, body)
    assert found.failure is failure
    assert found.message


def test_too_many_requests_say_nothing_of_health() -> None:
    """What may pass is tried again; only what is wrong with the provider opens the breaker."""
    assert Failure.RATE_LIMITED in RETRYABLE - CIRCUIT_FAILURES
    assert error(OPENAI, 408).failure in RETRYABLE & CIRCUIT_FAILURES


@pytest.mark.parametrize(
    ("provider", "status", "document", "failure"),
    [
        (
            OPENAI,
            400,
            {"error": {"code": "context_length_exceeded", "message": "long"}},
            Failure.CONTEXT_LENGTH_EXCEEDED,
        ),
        (OPENAI, 400, {"error": {"type": "content_filter"}}, Failure.CONTENT_FILTERED),
        (
            OPENAI,
            400,
            {"error": {"type": "content_filter_results_violation"}},
            Failure.CONTENT_FILTERED,
        ),
        (OPENAI, 500, {"error": {"code": "content_filter"}}, Failure.SERVER_ERROR),
        (
            ANTHROPIC,
            400,
            {"error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}},
            Failure.CONTEXT_LENGTH_EXCEEDED,
        ),
        (
            ANTHROPIC,
            400,
            {"error": {"type": "invalid_request_error", "message": "The context length is 8"}},
            Failure.CONTEXT_LENGTH_EXCEEDED,
        ),
        (
            ANTHROPIC,
            400,
            {
                "error": {
                    "type": "invalid_request_error",
                    "message": "Output blocked by content filtering policy",
                }
            },
            Failure.CONTENT_FILTERED,
        ),
        (ANTHROPIC, 400, {"error": {"type": "permission_error"}}, Failure.FORBIDDEN),
        (GEMINI, 400, {"error": {"status": "RESOURCE_EXHAUSTED"}}, Failure.RATE_LIMITED),
        (GEMINI, 400, {"error": {"message": "Blocked for safety"}}, Failure.CONTENT_FILTERED),
        (
            GEMINI,
            400,
            {"error": {"message": "The input token count (9) exceeds the maximum (8)"}},
            Failure.CONTEXT_LENGTH_EXCEEDED,
        ),
        (
            GEMINI,
            400,
            {"error": {"message": "API key not valid", "details": [{"reason": "API_KEY_INVALID"}]}},
            Failure.UNAUTHORIZED,
        ),
        (GEMINI, 500, {"error": {"message": "blocked"}}, Failure.SERVER_ERROR),
    ],
)
def test_words_that_say_more(
    provider: Provider, status: int, document: Any, failure: Failure
) -> None:
    """S3.20: what the provider says in its own words, where the status alone would not do."""
    assert error(provider, status, document).failure is failure


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry_after": "7"}, 7),
        ({"retry_after": "0"}, 0),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after": "9", "retry_after_ms": "250"}, 0.25),
        ({"retry_after": "-3"}, None),
        ({"retry_after": "nan"}, None),
        ({"retry_after": "soon"}, None),
        ({"retry_after": "1e300"}, 86_400),
        # The test's clock stands 1000 s after the epoch.
        ({"retry_after": "Thu, 01 Jan 1970 00:17:10 GMT"}, 30),
        ({"retry_after": "Thu, 01 Jan 1970 00:16:00 GMT"}, None),
        (
            {
                "retry_after": "Sun, 22 Nov 2026 10:00:05 GMT",
                "date": "Sun, 22 Nov 2026 10:00:00 GMT",
            },
            5,
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("provider", [OPENAI, ANTHROPIC, GEMINI], ids=lambda kind: kind.value)
def test_when_to_come_back(
    provider: Provider, headers: dict[str, str], seconds: float | None
) -> None:
    """Seconds, milliseconds, or a date in the future, by the provider's clock where it tells it; else nobody knows."""
    assert error(provider, 429, None, **headers).retry_after_s == seconds


def test_gemini_says_it_in_the_body() -> None:
    """As google.rpc.RetryInfo."""
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}]
    document = {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": details}}
    assert error(GEMINI, 429, document).retry_after_s == 34.5
    assert error(GEMINI, 429, [document]).retry_after_s == 34.5
    assert error(GEMINI, 429, document, retry_after="2").retry_after_s == 2


def test_what_the_caller_is_told() -> None:
    """The provider's words, cut, and what the error table documents."""
    body = {"error": {"message": "n is " + "wrong " * 1000, "param": "n", "code": None}}
    found = error(OPENAI, 400, body)
    assert found.metadata == {"status": "400", "param": "n"}
    assert found.message.startswith("OpenAI says: n is wrong")
    assert len(found.message) < 600
    error_of = found.to_error("openai", "gpt-9")
    assert (error_of.reason, error_of.param) == ("PROVIDER_REJECTED", "n")
    assert error(OPENAI, 503).metadata == {"status": "503"}
    assert error(OPENAI, 429, {"error": {"code": "insufficient_quota"}}).metadata == {
        "limit": "insufficient_quota"
    }
    assert error(OPENAI, 429).metadata == {"limit": "provider"}
    assert error(OPENAI, 429).may_pass
    body = {"error": {"code": "429", "type": "throttling_error"}}
    assert error(OPENAI, 429, body).metadata == {"limit": "throttling_error"}
    assert error(OPENAI, 500, {"error": "out of memory"}).message == "OpenAI says: out of memory"


@pytest.mark.parametrize("provider", list(Provider), ids=lambda provider: provider.value)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_no_error_holds_a_credential(provider: Provider, status: int) -> None:
    """What the provider quotes goes through the redactor, wherever it stands; of a refused key not even a part is told."""
    said = dict.fromkeys(("message", "type", "code", "param", "status"), f"x {SECRET} y")
    found = error(provider, status, {"error": said})
    assert SECRET not in found.message + str(found.metadata) + repr(found)
    if status == 401:
        assert "redacted" not in found.message


@pytest.mark.parametrize("field", ["code", "type"])
def test_an_unpaid_bill_is_not_waited_for(field: str) -> None:
    """It has the status of a rate limit; neither we nor our caller should try again."""
    found = error(OPENAI, 429, {"error": {field: "insufficient_quota"}})
    assert found.failure is Failure.RATE_LIMITED
    assert not found.may_pass
    assert found.to_error("openai", "gpt-9").retry_after_s is None
