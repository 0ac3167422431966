"""How the scripted provider misbehaves: faults, and which request each of them hits. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Final

FAULTS_MAX: Final = 1024
SIZE_MAX: Final = 1 << 26


class Kind(Enum):
    """What goes wrong."""

    STATUS = "status"
    """Another status than 200, with the provider's error body: `status`, `retry_after`, `reason`."""
    DELAY = "delay"
    """The status line comes `seconds` late; then all goes well."""
    DELAY_BODY = "delay_body"
    """The headers come at once, the first byte behind them `seconds` later."""
    PAUSE = "pause"
    """`seconds` pass before each piece from the one after `after` pieces on."""
    HANG = "hang"
    """Nothing more comes, and the connection stays open until the client leaves."""
    CUT = "cut"
    """The connection is closed."""
    GARBAGE = "garbage"
    """A data line that is no JSON, among the others."""
    OVERSIZED = "oversized"
    """A data line of `size` bytes, among the others."""
    ERROR_EVENT = "error_event"
    """An error of the provider (`status`, `reason`) as an event of a stream that began with 200."""
    FILTERED = "filtered"
    """The answer ends there, because a filter holds back the rest."""
    UNTERMINATED = "unterminated"
    """The body ends properly, but without the terminal marker; with `after`, without finish reason and usage too."""
    CONTENT_TYPE = "content_type"
    """200, and a page of HTML."""
    EMPTY = "empty"
    """200, the right content type, and no body."""


REASONS: Final = ("", "context_length", "content_filter", "quota", "overloaded")


class FaultError(ValueError):
    """A fault that makes no sense; the message says why."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to misbehave.

    after: pieces of the answer that come before it. None: for HANG and CUT, not even the status line comes; for the others, as 0.
    seconds: see the kind; kinds that do not name it begin so much later.
    retry_after: text of the Retry-After header, such as "2" or an HTTP date. "": none.
    reason: what the error body says, one of REASONS. "": the usual of the status.
    times: requests that it hits. None: all, until it is removed.
    """

    kind: Kind
    after: int | None = None
    seconds: float = 0.0
    status: int = 500
    retry_after: str = ""
    reason: str = ""
    size: int = 1 << 20
    times: int | None = 1

    def __post_init__(self) -> None:
        """Raises FaultError for values out of range."""
        if self.after is not None and self.after < 0:
            raise FaultError("`after` is negative")
        if not 0 <= self.seconds <= 86_400:
            raise FaultError("`seconds` is not within 0 to 86400")
        if not 400 <= self.status <= 599:
            raise FaultError("`status` is not within 400 to 599")
        if self.reason not in REASONS:
            raise FaultError(f"`reason` is none of {', '.join(filter(None, REASONS))}")
        if not 1 <= self.size <= SIZE_MAX:
            raise FaultError(f"`size` is not within 1 to {SIZE_MAX}")
        if self.times is not None and self.times < 1:
            raise FaultError("`times` is less than 1")
        if not (self.retry_after.isascii() and self.retry_after.isprintable()):
            raise FaultError("`retry_after` is no text for a header")


_NAMES: Final = {field.name for field in fields(Fault)}
ALWAYS: Final = "always"
"""As `times`: until it is removed."""
_WHOLE: Final = {"after", "status", "size", "times"}
_NULLABLE: Final = {"after", "times"}
_TEXTS: Final = {"retry_after", "reason"}


def fault_of(values: Mapping[str, Any]) -> Fault:
    """A fault from JSON-like values, such as {"kind": "cut", "after": 3}. Raises FaultError."""
    if unknown := set(values) - _NAMES:
        raise FaultError(f"no such field: {', '.join(sorted(unknown))}")
    named = dict(values)
    if named.get("times") == ALWAYS:
        named["times"] = None
    try:
        named["kind"] = Kind(named.get("kind"))
    except ValueError:
        kinds = ", ".join(kind.value for kind in Kind)
        raise FaultError(f"`kind` is none of {kinds}") from None
    for name, value in named.items():
        if value is None and name in _NULLABLE:
            continue
        wanted = int if name in _WHOLE else str if name in _TEXTS else (int, float)
        if name != "kind" and (isinstance(value, bool) or not isinstance(value, wanted)):
            raise FaultError(f"`{name}` is of the wrong type")
    return Fault(**named)


class FaultPlan:
    """The faults in force. The oldest hits the next request, alone; those behind it wait for its end."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Fault, int | None]] = []

    def add(self, fault: Fault) -> Fault:
        """Puts a fault behind the others. Raises FaultError beyond FAULTS_MAX."""
        if len(self._waiting) >= FAULTS_MAX:
            raise FaultError(f"more than {FAULTS_MAX} faults")
        self._waiting.append((fault, fault.times))
        return fault

    def remove(self, fault: Fault) -> None:
        """Takes a fault away; one that is used up already is not there any more."""
        self._waiting = [entry for entry in self._waiting if entry[0] != fault]

    def clear(self) -> None:
        """Takes all away."""
        self._waiting.clear()

    def take(self) -> Fault | None:
        """What hits the request that came just now."""
        if not self._waiting:
            return None
        fault, left = self._waiting[0]
        if left == 1:
            del self._waiting[0]
        elif left is not None:
            self._waiting[0] = (fault, left - 1)
        return fault

    def listed(self) -> list[Fault]:
        """The faults in force, oldest first, each with the `times` that are left of it."""
        return [replace(fault, times=left) for fault, left in self._waiting]
