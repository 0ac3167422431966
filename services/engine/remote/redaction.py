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
        self._forms: dict[str, _Forms] = {}
        self._longest_first: list[_Forms] = []
        for secret in secrets:
            self.add(secret)

    def __repr__(self) -> str:
        return f"Redactor({len(self._forms)} secrets)"

    def add(self, secret: str) -> None:
        """Remembers a secret, beside those before it."""
        if len(secret) < LEAST_CHARACTERS:
            return
        forms = self._forms.pop(secret) if secret in self._forms else _Forms(secret)
        self._forms[secret] = forms  # The youngest is the last.
        while len(self._forms) > KEPT_MAX:
            del self._forms[next(iter(self._forms))]
        # A secret may be part of another.
        ordered = sorted(self._forms, key=len, reverse=True)
        self._longest_first = [self._forms[one] for one in ordered]

    def clean(self, text: str) -> str:
        """The text without secrets."""
        for forms in self._longest_first:
            text = forms.remove(text)
        for shape in _SHAPES:
            text = shape.sub(rf"\g<1>{REDACTED}", text)
        return text

    def clean_error(self, error: ProviderError) -> ProviderError:
        """The same failure without secrets in what the caller gets of it."""
        return ProviderError(
            error.failure,
            self.clean(error.message),
            retry_after_s=error.retry_after_s,
            is_lasting=error.is_lasting,
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


class _Forms:
    """What one secret looks like. Made when it becomes known, on the event loop: that must not take long for a long one."""

    def __init__(self, secret: str) -> None:
        self._pattern = re.compile("".join(map(_escaped_if_need_be, secret)))
        self._literals = tuple(_in_base64(secret.encode()))

    def remove(self, text: str) -> str:
        """The text without it."""
        text = self._pattern.sub(REDACTED, text)
        for literal in self._literals:
            text = text.replace(literal, REDACTED)
        return text


def _escaped_if_need_be(character: str) -> str:
    """A pattern of a character as it is, or escaped as URLs, JSON or Python's `repr` do with those that mean something to them."""
    if character.isascii() and (character.isalnum() or character in "-._~"):
        return re.escape(character)
    if character == "\\":
        return r"(?:(?i:\\{1,4}u005c|%5c)|\\{1,4})"
    in_url = "".join(f"%{byte:02x}" for byte in character.encode(errors="replace"))
    return rf"(?:\\{{0,3}}(?:{re.escape(character)}|(?i:u{ord(character):04x}))|(?i:{in_url}))"


def _in_base64(secret: bytes) -> Iterator[str]:
    """What the secret becomes in base64 that begins anywhere before it: the characters that it alone decides."""
    for offset in range(3):
        encoded = base64.b64encode(bytes(offset) + secret).decode()
        core = encoded[-(-offset * 8 // 6) : (offset + len(secret)) * 8 // 6]
        if len(core) >= _BASE64_LEAST:
            yield core
            yield core.replace("+", "-").replace("/", "_")
