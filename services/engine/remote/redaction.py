"""Removes credentials from texts that others wrote: answers of providers, exceptions, logs of libraries (S3.16).

A secret is found as it is, and as it appears in URLs, in JSON and in base64, also as a part of what was encoded. What only looks like a
credential (`Bearer ...`, an API key's header or query parameter) is removed too, whoever's it is.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterator
from typing import Final

from services.engine.remote.failure import ProviderError

REDACTED: Final = "[redacted]"
LEAST_CHARACTERS: Final = 4
"""A shorter secret is none, and would turn all texts into dots."""
KEPT_MAX: Final = 32
"""Secrets that are remembered, the present one and those before it."""
_BASE64_LEAST: Final = 6  # Fewer characters are met by chance.
_SHAPES: Final = (
    re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=%-]{8,}"),
    re.compile(r"(?i)\b(basic\s+)[A-Za-z0-9+/=_-]{16,}"),
    re.compile(
        r"(?i)\b((?:authorization|x-api-key|api-key|x-goog-api-key)\b['\"]?\s*[:=,]\s*b?['\"]?)"
        r"(?!bearer\b|basic\b)[^\s'\",;)]{4,}"
    ),
    re.compile(r"(?i)([?&](?:key|api_key|api-key|access_token)=)[^&\s'\"#]+"),
)


class Redactor:
    """Knows the secrets of one engine. Holds up to KEPT_MAX; a new one then takes the place of the oldest."""

    def __init__(self, *secrets: str) -> None:
        self._secrets: dict[str, None] = {}
        self._pattern: re.Pattern[str] | None = None
        self._encoded: list[str] = []
        for secret in secrets:
            self.add(secret)

    def __repr__(self) -> str:
        return f"Redactor({len(self._secrets)} secrets)"

    def add(self, secret: str) -> None:
        """Remembers a secret, beside those before it."""
        if len(secret) < LEAST_CHARACTERS:
            return
        self._secrets.pop(secret, None)
        self._secrets[secret] = None
        while len(self._secrets) > KEPT_MAX:
            del self._secrets[next(iter(self._secrets))]
        # The longest first: a secret may be part of another.
        known = sorted(self._secrets, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_any_form, known)))
        encoded = {form for secret in known for form in _in_base64(secret.encode())}
        self._encoded = sorted(encoded, key=len, reverse=True)

    def clean(self, text: str) -> str:
        """The text without secrets."""
        if self._pattern is not None:
            text = self._pattern.sub(REDACTED, text)
        for encoded in self._encoded:
            text = text.replace(encoded, REDACTED)
        for shape in _SHAPES:
            text = shape.sub(rf"\g<1>{REDACTED}", text)
        return text

    def clean_error(self, error: ProviderError) -> ProviderError:
        """The same failure without secrets in what the caller gets of it."""
        return ProviderError(
            error.failure,
            self.clean(error.message),
            retry_after_s=error.retry_after_s,
            **{name: self.clean(value) for name, value in error.metadata.items()},
        )


class RedactingFormatter(logging.Formatter):
    """Formats as another formatter does, exceptions included, without secrets: libraries log headers when asked to log all."""

    def __init__(self, redactor: Redactor, inner: logging.Formatter) -> None:
        super().__init__()
        self._redactor = redactor
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.clean(self._inner.format(record))


def redact_logs(redactor: Redactor, logger: logging.Logger) -> None:
    """Lets nothing of a secret pass through the handlers that `logger` has now."""
    for handler in logger.handlers:
        inner = handler.formatter or logging.Formatter()
        handler.setFormatter(RedactingFormatter(redactor, inner))


def _any_form(secret: str) -> str:
    """A pattern of the secret as it is, or with any of its characters escaped as URLs, JSON or Python's `repr` do."""
    return "".join(_any_character(character) for character in secret)


def _any_character(character: str) -> str:
    code = ord(character)
    if character == "\\":
        return r"(?:(?i:\\{1,4}u005c|%5c)|\\{1,4})"
    escaped = "".join(f"%{byte:02x}" for byte in character.encode(errors="replace"))
    return rf"(?:\\{{0,3}}(?:{re.escape(character)}|(?i:u{code:04x}))|(?i:{escaped}))"


def _in_base64(secret: bytes) -> Iterator[str]:
    """What the secret becomes in base64 that begins anywhere before it: the characters that it alone decides."""
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + secret).decode()
        core = encoded[-(-offset * 8 // 6) : (offset + len(secret)) * 8 // 6]
        if len(core) >= _BASE64_LEAST:
            yield core
            yield core.replace("+", "-").replace("/", "_")
