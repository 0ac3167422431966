"""What the wires of the providers have in common: the parts of a stream, and the questions that the server asks of them. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from services.dev.provider.answers import Answer
from services.dev.provider.asked import Asked
from services.dev.provider.received import Received


@dataclass(frozen=True, slots=True)
class Frames:
    """The bytes of a streamed answer, in order: what comes before the first piece, the pieces, how it ended, the terminal marker."""

    opening: bytes
    pieces: tuple[bytes, ...]
    closing: bytes
    terminal: bytes


class Dialect(Protocol):
    """The wire of one provider."""

    def serves(self, path: str) -> bool:
        """Whether a POST to `path` (without query) asks for an answer."""
        ...

    def key(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str:
        """The credential that came; "" for none."""
        ...

    def asked(self, received: Received, body: Mapping[str, Any]) -> Asked:
        """Reads a request, whose decoded body is `body`. Raises AskedError."""
        ...

    def frames(self, asked: Asked, answer: Answer, number: int) -> Frames:
        """A streamed answer to the request with this number."""
        ...

    def plain(self, asked: Asked, answer: Answer, number: int) -> dict[str, Any]:
        """An answer in one piece."""
        ...

    def refusal(self, status: int, message: str, reason: str) -> tuple[int, dict[str, Any]]:
        """An error, by one of faults.REASONS: the status as this provider means it, and the body."""
        ...

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        """An error's body as an event of a stream."""
        ...


def compact(value: object) -> bytes:
    """JSON without white space, as providers send it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def data_event(value: object, name: str = "") -> bytes:
    """A server-sent event with JSON data; "" for one without a name."""
    named = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (named, compact(value))


def bearer(headers: Mapping[str, str]) -> str:
    """The token of an Authorization header; "" without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
