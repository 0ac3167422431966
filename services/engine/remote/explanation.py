"""What a provider says of a failure, in words that all providers share, and the error that follows (S3.19, S3.20). Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from services.engine.remote.failure import Failure, ProviderError
from services.engine.remote.provider import Provider

_MESSAGE_CHARACTERS_MAX: Final = 500
_REQUEST_ID_CHARACTERS_MAX: Final = 128
_RETRY_AFTER_MAX_S: Final = 86_400.0
_BY_STATUS: Final[Mapping[int, Failure]] = {
    401: Failure.UNAUTHORIZED,
    402: Failure.FORBIDDEN,  # What is owed must be paid first.
    403: Failure.FORBIDDEN,
    404: Failure.NOT_FOUND,
    408: Failure.SERVER_ERROR,  # May pass, as may 409 (W29).
    409: Failure.SERVER_ERROR,
    429: Failure.RATE_LIMITED,
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a provider says of a failure; texts are as it wrote them.

    `status` is of HTTP, or what HTTP would have said of an error within a stream. `kind` and `code` are words of its API.
    """

    status: int
    kind: str = ""
    code: str = ""
    message: str = ""
    param: str = ""
    retry_after_s: float | None = None

    @property
    def word(self) -> str:
        """The provider's word for it. Some servers repeat the status as the code, which says nothing more."""
        return self.kind if self.code.isdecimal() else self.code or self.kind


def failure_of_status(status: int) -> Failure:
    """What an HTTP status means where the provider says nothing more precise."""
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if 300 <= status < 400:
        return Failure.NOT_FOUND  # The API is somewhere else: the deployment's address is wrong.
    if 400 <= status < 500:
        return Failure.REJECTED
    return Failure.SERVER_ERROR


def explained_error(
    provider: Provider,
    failure: Failure,
    explanation: Explanation,
    redact: Callable[[str], str],
    *,
    is_lasting: bool = False,
) -> ProviderError:
    """The error for the caller. What the provider wrote is redacted and cut; of a refused credential nothing is quoted."""
    said = redact(explanation.message)[:_MESSAGE_CHARACTERS_MAX]
    if failure is Failure.UNAUTHORIZED:
        # Providers quote a part of the key here.
        text = f"{provider.title} does not take the credential of the deployment."
    elif said:
        text = f"{provider.title} says: {said}"
    else:
        text = f"{provider.title} answered with status {explanation.status}."
    return ProviderError(
        failure,
        text,
        retry_after_s=explanation.retry_after_s,
        is_lasting=is_lasting,
        **_metadata(failure, explanation, redact),
    )


def _metadata(
    failure: Failure, explanation: Explanation, redact: Callable[[str], str]
) -> dict[str, str]:
    """What core.v1.ErrorReason documents for the failure."""
    if failure is Failure.RATE_LIMITED:
        return {"limit": redact(explanation.word) or "provider"}
    if failure is Failure.CONTENT_FILTERED:
        return {"category": redact(explanation.word)}
    if failure is Failure.CONTEXT_LENGTH_EXCEEDED:
        return {"param": "messages"}
    if failure is Failure.REJECTED:
        found = {"status": str(explanation.status)}
        return {**found, "param": redact(explanation.param)} if explanation.param else found
    if failure is Failure.SERVER_ERROR:
        return {"status": str(explanation.status)}
    return {}


def document_of(body: bytes) -> Any:
    """The JSON document that a body is, None for none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None


def text_at(document: Any, *path: str) -> str:
    """The text at a place of a document, "" where there is none. Numbers are texts too: some providers' codes are."""
    for name in path:
        if not isinstance(document, dict):
            return ""
        document = document.get(name)
    if isinstance(document, int) and not isinstance(document, bool):
        return str(document)
    return document if isinstance(document, str) else ""


def provider_request_id(headers: Mapping[str, str]) -> str:
    """The provider's own id of a request, which its support asks for; "" where it tells none that could be shown."""
    told = headers.get("x-request-id") or headers.get("request-id") or ""
    return told[:_REQUEST_ID_CHARACTERS_MAX] if told.isprintable() else ""


def retry_after_s(headers: Mapping[str, str], wall: float) -> float | None:
    """How long the provider asks to be left alone, in seconds; None where it does not say, or says it wrongly.

    `retry-after-ms`, or `retry-after` in seconds or as an HTTP date, which is measured against the provider's own clock where it
    tells it. `wall` is ours, in seconds since the epoch. Cut at a day.
    """
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return min(milliseconds / 1000, _RETRY_AFTER_MAX_S)
    value = headers.get("retry-after", "")
    seconds = _number(value)
    if seconds is None:
        then = _http_date(value)
        if then is None:
            return None
        seconds = then - (_http_date(headers.get("date", "")) or wall)
        if seconds <= 0:
            return None
    return min(seconds, _RETRY_AFTER_MAX_S)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _http_date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
