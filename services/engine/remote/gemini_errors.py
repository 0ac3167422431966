"""Errors of the Gemini API, as bodies and as events of a stream. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from services.engine.remote.explanation import (
    Explanation,
    document_of,
    explained_error,
    failure_of_status,
    text_at,
)
from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider

_GEMINI: Final = Provider.GEMINI
_FILTERED: Final = re.compile(r"safety|blocked", re.IGNORECASE)
_TOO_LONG: Final = re.compile(
    r"too long|token count .*exceeds|exceeds the maximum number of tokens", re.IGNORECASE
)
_BAD_KEY: Final = "API_KEY_INVALID"
_SECONDS: Final = re.compile(r"(\d{1,6}(?:\.\d{1,9})?)s")


def error_of_response(
    status: int,
    body: bytes,
    retry_s: float | None,
    redact: Callable[[str], str],
) -> ProviderError:
    """What an answer other than 200 means. `retry_s` is what its headers ask for, in seconds."""
    document = document_of(body)
    if isinstance(document, list) and document:
        document = document[0]  # A stream that is no stream of events is a list.
    error = document.get("error") if isinstance(document, dict) else None
    return _error(status, error, retry_s, redact)


def error_of_event(error: Any, redact: Callable[[str], str]) -> ProviderError:
    """What the member `error` of an event means."""
    code = text_at(error, "code")
    status = int(code) if code.isdecimal() and len(code) == 3 else 500
    return _error(status, error, None, redact)


def blocked_prompt(reason: str, redact: Callable[[str], str]) -> ProviderError:
    """The API answered 200, and that it does not answer."""
    explanation = Explanation(200, code=reason, message=f"The prompt was blocked ({reason}).")
    return explained_error(_GEMINI, Failure.CONTENT_FILTERED, explanation, redact)


def _error(
    status: int, error: Any, retry: float | None, redact: Callable[[str], str]
) -> ProviderError:
    kind, message = text_at(error, "status"), text_at(error, "message")
    details = _details(error)
    explanation = Explanation(
        status,
        kind=kind,
        message=message,
        retry_after_s=_retry_delay(details) if retry is None else retry,
    )
    return explained_error(_GEMINI, _failure(status, kind, message, details), explanation, redact)


def _failure(status: int, kind: str, message: str, details: list[Any]) -> Failure:
    """S3.20 on top of the status. A wrong key is told with 400."""
    if kind == "RESOURCE_EXHAUSTED":
        return Failure.RATE_LIMITED
    if status == 400:
        if any(text_at(detail, "reason") == _BAD_KEY for detail in details):
            return Failure.UNAUTHORIZED
        if _TOO_LONG.search(message):
            return Failure.CONTEXT_LENGTH_EXCEEDED
        if _FILTERED.search(message):
            return Failure.CONTENT_FILTERED
    return failure_of_status(status)


def _details(error: Any) -> list[Any]:
    details = error.get("details") if isinstance(error, dict) else None
    return details if isinstance(details, list) else []


def _retry_delay(details: list[Any]) -> float | None:
    """What google.rpc.RetryInfo says, in seconds: Gemini sends no Retry-After."""
    for detail in details:
        match = _SECONDS.fullmatch(text_at(detail, "retryDelay"))
        if match:
            return float(match[1])
    return None
