"""Errors of the OpenAI API, as bodies and as events of a stream. Pure."""

from __future__ import annotations

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

_FILTERS: Final = frozenset(
    {"content_filter", "content_filter_results_violation", "content_policy_violation"}
)
_CONTEXT: Final = "context_length_exceeded"
_UNPAID: Final = "insufficient_quota"
"""Has the status of a rate limit, and lasts until somebody pays."""
# Within a stream there is no status: what HTTP would have said.
_STATUSES: Final[Mapping[str, int]] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    _UNPAID: 429,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "tokens": 429,
    "requests": 429,
    _CONTEXT: 400,
    **dict.fromkeys(_FILTERS, 400),
}


def error_of_response(
    provider: Provider,
    status: int,
    body: bytes,
    retry_s: float | None,
    redact: Callable[[str], str],
) -> ProviderError:
    """What an answer other than 200 means. `retry_s` is what its headers ask for, in seconds."""
    document = document_of(body)
    error = document.get("error", document) if isinstance(document, dict) else None
    return _error(provider, _explanation(status, error, retry_s), redact)


def error_of_event(provider: Provider, error: Any, redact: Callable[[str], str]) -> ProviderError:
    """What the member `error` of an event means."""
    code = text_at(error, "code")
    status = int(code) if code.isdecimal() and len(code) == 3 else 0
    if not status:
        status = _STATUSES.get(code) or _STATUSES.get(text_at(error, "type")) or 500
    return _error(provider, _explanation(status, error, None), redact)


def _error(
    provider: Provider, explanation: Explanation, redact: Callable[[str], str]
) -> ProviderError:
    is_lasting = _UNPAID in {explanation.code, explanation.kind}
    failure = _failure(explanation)
    return explained_error(provider, failure, explanation, redact, is_lasting=is_lasting)


def _explanation(status: int, error: Any, retry: float | None) -> Explanation:
    message = error if isinstance(error, str) else text_at(error, "message")
    return Explanation(
        status,
        kind=text_at(error, "type"),
        code=text_at(error, "code"),
        message=message or text_at(error, "detail"),
        param=text_at(error, "param"),
        retry_after_s=retry,
    )


def _failure(explanation: Explanation) -> Failure:
    """S3.20 on top of the status. Azure and LiteLLM tell of their filters with 400 too."""
    if 400 <= explanation.status < 500:
        if explanation.code == _CONTEXT:
            return Failure.CONTEXT_LENGTH_EXCEEDED
        if _FILTERS & {explanation.code, explanation.kind}:
            return Failure.CONTENT_FILTERED
    return failure_of_status(explanation.status)
