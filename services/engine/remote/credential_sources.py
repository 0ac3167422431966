"""Where a secret is, and how it is read there. What is read appears in no error and in no `repr`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

from caravan.engine.v1 import remote_options_pb2 as pb

FILE_BYTES_MAX: Final = 64 << 10


class SourceError(Exception):
    """Nothing usable stands there; the message says why, without it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read. `expires_at` is in seconds since the epoch; `signature` tells a file's versions apart."""

    secret: str = field(repr=False)
    expires_at: float | None
    signature: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class EnvSource:
    """An environment variable."""

    name: str

    def __str__(self) -> str:
        return f"env {self.name}"

    def read(self, environ: Mapping[str, str]) -> Reading:
        """Raises SourceError."""
        value = environ.get(self.name)
        if value is None:
            raise SourceError("the variable is not set")
        return Reading(checked(value), None)


@dataclass(frozen=True, slots=True)
class InlineSource:
    """The secret itself, from the options."""

    secret: str = field(repr=False)

    def __str__(self) -> str:
        return "inline"

    def read(self, environ: Mapping[str, str]) -> Reading:
        """Raises SourceError."""
        return Reading(checked(self.secret), None)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file with the secret, or with JSON such as {"token": "...", "expires_at": "2026-01-31T12:00:00Z"}."""

    path: str

    def __str__(self) -> str:
        return f"file {self.path}"

    def signature(self) -> tuple[int, ...] | None:
        """Differs after a change; None where there is no file. Blocks."""
        try:
            return _signature(Path(self.path).stat())
        except (OSError, ValueError):
            return None

    def read(self, environ: Mapping[str, str]) -> Reading:
        """Raises SourceError. Blocks."""
        try:
            with Path(self.path).open("rb") as file:
                # Taken before reading: a change meanwhile is then seen as one later.
                signature = _signature(os.fstat(file.fileno()))
                content = file.read(FILE_BYTES_MAX + 1)
        except (OSError, ValueError) as error:  # A path with a NUL is a ValueError.
            why = getattr(error, "strerror", None) or "the path is none"
            raise SourceError(f"the file cannot be read ({why})") from None
        if len(content) > FILE_BYTES_MAX:
            raise SourceError(f"the file is larger than {FILE_BYTES_MAX} bytes")
        try:
            text = content.decode().strip()
        except UnicodeDecodeError:
            raise SourceError("the file is no text") from None
        if not text.startswith("{"):
            return Reading(checked(text), None, signature)
        token, expires_at = _from_json(text)
        return Reading(checked(token), expires_at, signature)


Source: TypeAlias = EnvSource | FileSource | InlineSource


def source_of(credential: pb.Credential) -> Source | None:
    """The source that the options name; None: no credential is sent."""
    match credential.WhichOneof("source"):
        case "env":
            return EnvSource(credential.env)
        case "file":
            return FileSource(credential.file)
        case "inline":
            return InlineSource(credential.inline)
        case _:
            return None


def checked(secret: str) -> str:
    """The secret without white space around it. Raises SourceError for one that no HTTP header can carry.

    HTTP libraries quote a header that they refuse, so it must not come to them.
    """
    secret = secret.strip()
    if not secret:
        raise SourceError("the secret is empty")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise SourceError("the secret has characters that a header cannot carry")
    return secret


def _signature(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _from_json(text: str) -> tuple[str, float | None]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        raise SourceError("the file begins like JSON and is none") from None
    token, expires_at = read.get("token"), read.get("expires_at")
    if not isinstance(token, str):
        raise SourceError('the JSON has no text "token"')
    if expires_at is None:
        return token, None
    try:
        moment = datetime.fromisoformat(expires_at)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        raise SourceError(
            '"expires_at" of the JSON is no time such as 2026-01-31T12:00:00Z'
        ) from None
    return token, seconds if math.isfinite(seconds) else None
