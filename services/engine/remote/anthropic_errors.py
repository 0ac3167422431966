"""Errors of the Anthropic API, as bodies and as events of a stream. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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

_ANTHROPIC: Final = Provider.ANTHROPIC
_TOO_LONG: Final = re.compile(r"context (length|window)|too long", re.IGNORECASE)
_FILTERED: Final = "blocked by content filtering policy"
"""In the messages of a kind that mistakes of callers have too; there is no code for it."""
# Within a stream there is no status: what HTTP would have said.
_STATUSES: Final[Mapping[str, int]] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def error_of_response(
    status: int,
    body: bytes,
    retry_s: float | None,
    redact: Callable[[str], str],
) -> ProviderError:
    """What an answer other than 200 means. `retry_s` is what its headers ask for, in seconds."""
    document = document_of(body)
    error = document.get("error") if isinstance(document, dict) else None
    return _error(status, error, retry_s, redact)


def error_of_event(error: Any, redact: Callable[[str], str]) -> ProviderError:
    """What the member `error` of an event means."""
    return _error(_STATUSES.get(text_at(error, "type"), 500), error, None, redact)


def _error(
    status: int, error: Any, retry: float | None, redact: Callable[[str], str]
) -> ProviderError:
    kind, message = text_at(error, "type"), text_at(error, "message")
    explanation = Explanation(status, kind=kind, message=message, retry_after_s=retry)
    failure = failure_of_status(status)
    if kind == "permission_error":
        failure = Failure.FORBIDDEN
    elif kind == "invalid_request_error" and status < 500 and _TOO_LONG.search(message):
        failure = Failure.CONTEXT_LENGTH_EXCEEDED
    elif kind == "invalid_request_error" and status < 500 and _FILTERED in message:
        failure = Failure.CONTENT_FILTERED
    return explained_error(_ANTHROPIC, failure, explanation, redact)
